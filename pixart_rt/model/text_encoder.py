"""The T5 v1.1 encoder (arXiv:1910.10683, arXiv:2002.05202), safe in half precision.

Three facts make T5 overflow float16 or differ silently; all are explicit here:
  - attention has no 1/√d scale, and a learned position bias that layer 0 owns for all layers;
  - the residual stream grows beyond 65504, so it, RMSNorm and (in float16) the `wo` product
    of the feed-forward stay float32;
  - padding is masked in every layer.
B prompts, T tokens, E width, H heads. Any run of layers can be a module of its own, so that an
encoder too large for one engine becomes several.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixart_rt.errors import CheckpointError
from pixart_rt.files import read_json
from pixart_rt.typed import check_types

MASKED = -1e9  # added to float32 scores of padding; exp() of it is exactly 0


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Config:
    """The part of a transformers T5 configuration that an encoder needs."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for sizes that no T5 has."""
        check_types(self)
        for name in self.__dataclass_fields__:
            value, most = getattr(self, name), 256 if name == "num_layers" else 2**24
            if not 0 < value <= most:
                raise ValueError(f"{name} is {value}")

    @classmethod
    def read(cls, folder: Path) -> T5Config:
        """From the config.json of a transformers T5EncoderModel folder."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no config.json; it is not a text encoder folder")
        try:
            values = read_json(path)
            found = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
            config = cls(**found)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is no T5 configuration ({error})") from error
        if values.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
            raise CheckpointError(
                f"{path} is a T5 with {values['feed_forward_proj']} feed-forward; PixArt uses "
                "T5 v1.1 (gated-gelu)"
            )
        return config


T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 whatever the precision; the result has `dtype`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.to(x.dtype)).to(dtype)


class T5Layer(nn.Module):
    """Self-attention with position bias, then the gated feed-forward. The stream is float32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        width, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = (config.num_heads, config.d_kv)
        self.attn_norm = RMSNorm(width, config.layer_norm_epsilon)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        self.mlp_norm = RMSNorm(width, config.layer_norm_epsilon)
        self.wi_0 = nn.Linear(width, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(width, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, width, bias=False)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """hidden [B, T, E] float32; bias [B, H, T, T] float32: positions and mask."""
        dtype = self.q.weight.dtype
        x = self.attn_norm(hidden, dtype)
        q, k, v = (
            project(x).unflatten(-1, self.heads).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(-1, -2)).to(hidden.dtype) + bias
        mixed = (scores.softmax(-1).to(dtype) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + self.o(mixed).to(hidden.dtype)
        x = self.mlp_norm(hidden, dtype)
        wide = self.wo.weight.dtype
        gated = F.gelu(self.wi_0(x), approximate="tanh").to(wide) * self.wi_1(x).to(wide)
        return hidden + self.wo(gated).to(hidden.dtype)


class T5Encoder(nn.Module):
    """Layers `start` to `stop` of an encoder; by default all.

    The first part embeds the tokens, the last applies the final norm. `forward` of the first
    takes input_ids [B, T], of the others the float32 stream [B, T, E]; attention_mask [B, T] is
    1 for tokens and 0 for padding. Returns [B, T, E] float32.
    """

    def __init__(self, config: T5Config, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        stop = config.num_layers if stop is None else stop
        self.config, self.start, self.stop = config, start, stop
        if start == 0:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.relative = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.layers = nn.ModuleList(T5Layer(config) for _ in range(start, stop))
        if stop == config.num_layers:
            self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.register_buffer("folded_bias", None, persistent=False)

    def fold_position_bias(self, num_tokens: int) -> None:
        """Keep the position bias as a constant [1, H, T+1, T+1], for an export up to T tokens.

        It depends on distances only, so that its corner is the bias of a shorter text. One more
        than T, because torch.export has to know whether the corner is the whole: never.
        """
        self.folded_bias = self.position_bias(num_tokens + 1).detach()

    def position_bias(self, num_tokens: int) -> Tensor:
        """The learned bias of every query-key distance: [1, H, T, T] float32."""
        bucket = relative_bucket(num_tokens, self.config, self.relative.weight.device)
        wide = torch.promote_types(self.relative.weight.dtype, torch.float32)
        return self.relative(bucket).to(wide).permute(2, 0, 1)[None]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        if self.start == 0:
            embedded = self.embed(hidden)
            hidden = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        positions = self.folded_bias
        if positions is None:
            positions = self.position_bias(hidden.shape[1])
        positions = positions[:, :, : hidden.shape[1], : hidden.shape[1]]
        padding = (1 - attention_mask[:, None, None].to(hidden.dtype)) * MASKED
        bias = positions.to(hidden.dtype) + padding
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return self.final_norm(hidden, hidden.dtype) if hasattr(self, "final_norm") else hidden


def relative_bucket(
    num_tokens: int, config: T5Config, device: torch.device | None = None
) -> Tensor:
    """The bucket of each key position relative to each query: [T, T] int64 (T5, Section 2.1).

    Half the buckets are for keys after the query. In each half, small distances have a bucket of
    their own and larger ones share logarithmic buckets up to the maximal distance. Made on `device`
    from scalars alone: a tensor copied from the host could not be captured in a CUDA graph.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    position = torch.arange(num_tokens, device=device)
    offset = position[None] - position[:, None]  # key minus query
    distance = offset.abs()
    bucket = distance.clamp(max=exact)
    for first in _coarse_buckets(exact, half - exact, config.relative_attention_max_distance):
        bucket = bucket + (distance >= first)
    return bucket + (offset > 0) * half


def _coarse_buckets(exact: int, count: int, furthest: int) -> list[int]:
    """Where each logarithmic bucket but the first begins: the least distance d with

        log(d / exact) / log(furthest / exact) · count >= k,  k = 1 .. count - 1

    in integers, so that no logarithm's rounding decides where d is a power: 16, 32, 64.
    """
    return [
        next(
            d
            for d in range(exact, furthest + 1)
            if d**count * exact**k >= furthest**k * exact**count
        )
        for k in range(1, count)
    ]


def keep_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a T5 parameter when the encoder runs in `dtype`."""
    in_float32 = "norm" in name or (dtype == torch.float16 and ".wo." in name)
    return torch.float32 if in_float32 else dtype
