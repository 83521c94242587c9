"""Image tokens attend to text tokens, in the cheapest of three forms that are exact.

B images, N image tokens, T text tokens (120 or 300), H heads of K = 72 lanes, D = H·K. q is
[B, N, H, K]; kv is [B, T, 2, H, K], made once for each prompt; key_mask [B, T] is True where a text
token may be seen. A row of the mask that is False everywhere is the caller's error: its result is
finite but means nothing. PixArt-alpha: arXiv:2310.00426; the standard form runs the kernels of
attention.py (FlashAttention, arXiv:2205.14135), which carry the mask in a spare lane of the keys.

    standard    softmax(q·kᵀ/√K + mask)·v, between the projections of q and of the output
    constant    one visible token has weight 1 for every query: out = proj(its v), [B, 1, D]
    absorbed    both projections move to the text side, for prompts of at most L tokens:

        scores_h = (x·Wq_hᵀ + bq_h)·k_hᵀ/√K = x·(Wq_hᵀ·k_h/√K)ᵀ + bq_h·k_h/√K     keys', bias
        out      = Σ_h P_h·v_h·Wo_hᵀ + bo    = Σ_h P_h·(v_h·Wo_hᵀ + bo/H)          values'

    (the weights of each head sum to 1, so that bo needs no addition of its own)

    with x [B, N, D], the input of the q projection. Of two D×D products and the attention over 120
    tokens remain two D×(H·L) products: 0.22, 0.44 and 0.84 of the work at L = 16, 32 and 64, more
    than all of it from L = 72 on. PixArt's empty prompt is one token; most prompts have 10 to 60.

Traffic: standard reads q and writes the output, 2·B·N·D elements; absorbed reads x, writes and
reads the probabilities B·N·H·L, writes the output, or adds it to x where it is: 3·B·N·D in all.
kv, keys' and values' stay in L2.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels.attention import attend, attention_ref
from pixart_rt.kernels.attention_backward import attention_backward_ref, backward, lse_ref, splits
from pixart_rt.kernels.attention_tiles import (
    HEAD,
    SM120,
    Config,
    newest,
    takes,
    takes_traced,
)
from pixart_rt.kernels.launch import (
    SM80,
    SM90,
    Operator,
    capability,
    ceil_div,
    config,
    direct,
    exporting,
    launch,
    runs_triton,
)
from pixart_rt.kernels.triton_import import TensorDescriptor, tl, triton

# Chosen as those of attention.py.
SCORES: dict[tuple[int, int], Config] = {
    SM80: {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 0},
    SM90: {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
    SM120: {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 1},
}
SCORES_FLOAT32: Config = {
    "BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "DESCRIPTORS": 0,
}  # fmt: skip
COLUMNS = 128  # scores a program forms for each query: whole heads, at every length
UNSEEN = -1e9  # the bias of a slot without a token: its weight is exactly 0


class Form(enum.Enum):
    """How cross-attention is computed. The value of an absorbed form is its L."""

    STANDARD = 0
    CONSTANT = 1
    ABSORBED_16 = 16
    ABSORBED_32 = 32
    ABSORBED_64 = 64


class Absorbed(NamedTuple):
    """What `absorb` makes of one prompt's kv in one block, once for each prompt."""

    keys: Tensor  # [B, H·L, D], with 1/√K
    bias: Tensor  # [B, H, L] float32: a bias rounded to 16 bits would shift whole scores
    values: Tensor  # [B, H·L, D], with the output projection's bias


def choose_form(num_valid: int) -> Form:
    """The form with the least work for prompts of at most `num_valid` visible tokens.

    All images of a call share a form; use the largest count among them. Work against the standard
    form at T = 120: 0.22 at L = 16, 0.44 at 32, 0.84 at 64, above 1 from 72.
    """
    if num_valid == 1:
        return Form.CONSTANT
    for form in (Form.ABSORBED_16, Form.ABSORBED_32, Form.ABSORBED_64):
        if num_valid <= form.value:
            return form
    return Form.STANDARD


def cross_attention_ref(q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
    """The standard form by PyTorch's attention; [B, N, H·K]."""
    k, v = kv.permute(2, 0, 3, 1, 4)
    return attention_ref(q.transpose(1, 2), k, v, key_mask).transpose(1, 2).flatten(2)


def cross_attention_backward_ref(
    dout: Tensor, q: Tensor, kv: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(dq [B, N, H, K], dkv [B, T, 2, H, K])."""
    dout, out = (each.unflatten(2, q.shape[2:]).transpose(1, 2) for each in (dout, out))
    k, v = kv.permute(2, 0, 3, 1, 4)
    dq, dk, dv = attention_backward_ref(dout, q.transpose(1, 2), k, v, out, lse, key_mask)
    return dq.transpose(1, 2).contiguous(), torch.stack([dk, dv]).permute(
        1, 3, 0, 2, 4
    ).contiguous()


def is_constant(key_mask: Tensor) -> Tensor:
    """Which images see exactly one token; [B] bool."""
    return key_mask.sum(-1) == 1


def cross_attention_constant(
    kv: Tensor, key_mask: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """The projected output [B, 1, D], equal for all queries, where `is_constant(key_mask)`."""
    images = torch.arange(kv.shape[0], device=kv.device)
    values = kv[images, key_mask.int().argmax(1), 1]
    return F.linear(values.flatten(1), proj_weight, proj_bias)[:, None]


def absorb(
    kv: Tensor,
    key_mask: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    length: int,
) -> Absorbed:
    """Fold both projections into kv's visible tokens, of which each image has at most `length`.

    Formed in float32 or wider, then rounded once to kv's dtype. Every head gets its share of the
    output's bias: in one head's values alone, a large bias would cost them digits, and the weights'
    rounding would change all of it at once.
    """
    B, _, _, H, K = kv.shape
    most = int(key_mask.sum(-1).max())  # a wait for the device, once for each prompt
    if length not in (16, 32, 64) or most > length:
        raise ValueError(
            f"absorb: length must be 16, 32 or 64 and at least the {most} visible tokens of the "
            f"longest prompt, got {length}; ask choose_form"
        )
    wide = torch.promote_types(kv.dtype, torch.float32)
    # Visible tokens first and in order. The prompt may be shorter than the slots.
    order = key_mask.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    order = F.pad(order, (0, length - order.shape[1]))
    slots = torch.arange(length, device=kv.device) < key_mask.sum(-1, keepdim=True)
    tokens = kv[torch.arange(B, device=kv.device)[:, None], order].to(wide)
    tokens = tokens * slots[:, :, None, None, None]
    k, v = tokens.unbind(2)
    k = k / math.sqrt(K)
    keys = torch.einsum("blhk,hkd->bhld", k, q_weight.to(wide).view(H, K, -1))
    bias = torch.einsum("blhk,hk->bhl", k, q_bias.to(wide).view(H, K))
    values = torch.einsum("blhk,dhk->bhld", v, proj_weight.to(wide).view(-1, H, K))
    values = values + slots[:, None, :, None] * (proj_bias.to(wide) / H)
    return Absorbed(
        keys=keys.flatten(1, 2).to(kv.dtype),
        bias=bias.masked_fill(~slots[:, None], UNSEEN),
        values=values.flatten(1, 2).to(kv.dtype),
    )


def cross_attention_absorbed_ref(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    """The absorbed form in float32 or wider; [B, N, D] in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = (x.to(wide) @ keys.to(wide).mT).unflatten(-1, bias.shape[1:]) + bias[:, None].to(wide)
    return (scores.softmax(-1).flatten(2) @ values.to(wide)).to(x.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _absorbed_scores_kernel(
    x_src, keys_src, bias_ptr, num_tokens, num_columns,
    p_ptr,
    D: tl.constexpr, L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """softmax over each head's L columns of x·keysᵀ + bias, for BLOCK_M tokens of one image."""
    image = tl.program_id(2).to(tl.int64)
    first, column = tl.program_id(1) * BLOCK_M, tl.program_id(0) * COLUMNS
    rows, columns = first + tl.arange(0, BLOCK_M), column + tl.arange(0, COLUMNS)
    scores = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    if DESCRIPTORS:
        x_row = (image * num_tokens + first).to(tl.int32)
        key_row = (image * num_columns + column).to(tl.int32)
        for at in range(0, D, BLOCK_K):  # past D both read zeros; past the image it is not stored
            x = x_src.load([x_row, at])
            keys = keys_src.load([key_row, at])
            scores = tl.dot(x, tl.trans(keys), scores, input_precision="ieee")
    else:
        # A row past the end is the last one again: no masks in the loop, and it is not stored.
        depth = tl.arange(0, BLOCK_K)
        x_ptrs = x_src + image * num_tokens * D + depth[None, :]
        x_ptrs += tl.minimum(rows, num_tokens - 1)[:, None] * D
        key_ptrs = keys_src + image * num_columns * D + depth[None, :]
        key_ptrs += tl.minimum(columns, num_columns - 1)[:, None] * D
        for at in range(0, D, BLOCK_K):
            if D % BLOCK_K == 0:
                x = tl.load(x_ptrs + at)
                keys = tl.load(key_ptrs + at)
            else:
                inside = (at + depth < D)[None, :]
                x = tl.load(x_ptrs + at, mask=inside, other=0.0)
                keys = tl.load(key_ptrs + at, mask=inside, other=0.0)
            scores = tl.dot(x, tl.trans(keys), scores, input_precision="ieee")
    bias = tl.load(bias_ptr + image * num_columns + columns, columns < num_columns, other=0.0)
    scores = (scores + bias[None, :]) * 1.4426950408889634
    scores = tl.reshape(scores, [BLOCK_M, COLUMNS // L, L])
    p = tl.exp2(scores - tl.max(scores, 2, keep_dims=True))
    p = tl.reshape(p / tl.sum(p, 2, keep_dims=True), [BLOCK_M, COLUMNS])
    offsets = (image * num_tokens + first) * num_columns + column
    offsets += tl.arange(0, BLOCK_M)[:, None] * num_columns + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < num_tokens)[:, None] & (columns < num_columns)[None, :]
    tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=inside)


def cross_attention_triton(
    q: Tensor, kv: Tensor, key_mask: Tensor, tuned: Config | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K], log-sum-exp [B, H, N])."""
    H, buffer = q.shape[2], kv.contiguous().flatten(2, 3)
    heads = (0, 0, H)
    return attend("cross_attention", q.contiguous(), buffer, heads, H, key_mask.contiguous(), tuned)


def cross_attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    key_mask: Tensor,
    out: Tensor,
    lse: Tensor,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(dq [B, N, H, K], dkv [B, T, 2, H, K]); the parts of dkv are added in a fixed order."""
    q, kv = q.contiguous(), kv.contiguous()
    dq = torch.empty_like(q)
    parts = kv.new_empty(splits(q.shape[1]), *kv.shape, dtype=torch.float32)
    dk, dv = parts.unbind(3)
    saved = (q, kv.flatten(2, 3), out.contiguous(), lse.contiguous())
    heads = (0, 0, q.shape[2])
    backward("cross_attention", dout, saved, heads, (dq, dk, dv), key_mask.contiguous(), tuned)
    return dq, parts.sum(0).to(kv.dtype)


def absorbed_scores_triton(
    x: Tensor, keys: Tensor, bias: Tensor, tuned: Config | None = None
) -> Tensor:
    """Probabilities [B, N, H·L] in x's dtype."""
    x, keys, bias = x.contiguous(), keys.contiguous(), bias.float().contiguous()
    (B, N, D), (_, H, L) = x.shape, bias.shape
    default = SCORES_FLOAT32 if x.dtype == torch.float32 else newest(SCORES, x)
    chosen = {**config("cross_attention_absorbed", x, (B * N, D, H * L), default), **(tuned or {})}
    aligned = all(part % 16 == 0 for part in (x.data_ptr(), keys.data_ptr(), D * x.element_size()))
    if capability(x) < SM90 or not aligned:
        chosen["DESCRIPTORS"] = 0
    sources = (x, keys)
    if chosen["DESCRIPTORS"]:
        blocks = [chosen["BLOCK_M"], chosen["BLOCK_K"]], [COLUMNS, chosen["BLOCK_K"]]
        sources = tuple(
            TensorDescriptor.from_tensor(each.view(-1, D), block)
            for each, block in zip(sources, blocks, strict=True)
        )
    p = x.new_empty(B, N, H * L)
    launch(
        _absorbed_scores_kernel,
        (ceil_div(H * L, COLUMNS), ceil_div(N, chosen["BLOCK_M"]), B),
        *sources, bias, N, H * L, p, D=D, L=L, COLUMNS=COLUMNS, **chosen,
    )  # fmt: skip
    return p


@torch.library.custom_op("pixart_rt::cross_attention", mutates_args=())
def cross_attention_op(q: Tensor, kv: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K] in q's dtype, log-sum-exp [B, H, N] in float32 or wider)."""
    if takes("cross_attention", q):
        return cross_attention_triton(q, kv, key_mask)
    out = cross_attention_ref(q, kv, key_mask).contiguous()
    return out, lse_ref(q.transpose(1, 2), kv[:, :, 0].transpose(1, 2), key_mask)


@cross_attention_op.register_fake
def _(q: Tensor, kv: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    B, N, H, K = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(B, N, H * K), q.new_empty(B, H, N, dtype=wide)


@torch.library.custom_op("pixart_rt::cross_attention_backward", mutates_args=())
def cross_attention_backward_op(
    dout: Tensor, q: Tensor, kv: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(dq [B, N, H, K], dkv [B, T, 2, H, K])."""
    if takes("cross_attention", q):
        return cross_attention_backward_triton(dout, q, kv, key_mask, out, lse)
    return cross_attention_backward_ref(dout, q, kv, key_mask, out, lse)


@cross_attention_backward_op.register_fake
def _(
    dout: Tensor, q: Tensor, kv: Tensor, key_mask: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *cross_attention_backward_op(dout, *ctx.saved_tensors), None


cross_attention_op.register_autograd(_backward, setup_context=_setup)


def cross_attention(q: Tensor, kv: Tensor, key_mask: Tensor) -> Tensor:
    """The standard form: [B, N, H·K]. Differentiable in q and kv."""
    # As in attention_qkv_packed: where no kernel runs, PyTorch differentiates its own attention.
    if torch.compiler.is_compiling():
        runs = exporting() or takes_traced("cross_attention", q)
    else:
        runs = takes("cross_attention", q)
    if not runs:
        return cross_attention_ref(q, kv, key_mask)
    if direct(q, kv, key_mask):
        return cross_attention_triton(q, kv, key_mask)[0]
    out: Tensor = cross_attention_op(q, kv, key_mask)[0]
    return out


@torch.library.custom_op("pixart_rt::cross_attention_absorbed", mutates_args=())
def cross_attention_absorbed(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    """The absorbed form of x [B, N, D] and what `absorb` made: [B, N, D]. Inference only."""
    if _takes_absorbed(x):
        return torch.bmm(absorbed_scores_triton(x, keys, bias), values)
    return cross_attention_absorbed_ref(x, keys, bias, values)


@cross_attention_absorbed.register_fake
def _(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("pixart_rt::add_cross_attention_absorbed", mutates_args=("x",))
def add_cross_attention_absorbed(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> None:
    """x += its absorbed form, where x is: the product with values' adds to it and rounds once."""
    if _takes_absorbed(x) and x.dtype == values.dtype:
        x.baddbmm_(absorbed_scores_triton(x, keys, bias), values)
    else:
        x.add_(cross_attention_absorbed_ref(x, keys, bias, values))


@add_cross_attention_absorbed.register_fake
def _(x: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> None:
    return None


def _takes_absorbed(x: Tensor) -> bool:
    known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return known and runs_triton("cross_attention_absorbed", x, SM80)


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size with prompts of 1, 77 and 120 tokens, an outlier channel."""
    return _masked(150, 2, [1, 77, 120], device, dtype, seed)


def _production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Tensor, ...]]:
    """XL's heads, and more than two of the largest tiles."""
    yield _masked(300, 16, [70, 120], device, dtype, seed)


def _masked(
    N: int, H: int, valid: list[int], device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(len(valid), N, H, HEAD, generator=random)
    kv = torch.randn(len(valid), 120, 2, H, HEAD, generator=random)
    q[..., 5] *= 8
    key_mask = torch.arange(120) < torch.tensor(valid)[:, None]
    return q.to(device, dtype), kv.to(device, dtype), key_mask.to(device)


def _absorbed_example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """As `_example` with prompts of 1, 17 and 32 tokens, absorbed at L = 32."""
    return _absorbed(150, 2, [1, 17, 32], 32, device, dtype, seed)


def _absorbed_production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Tensor, ...]]:
    """XL's width at every length."""
    for length in (16, 32, 64):
        yield _absorbed(300, 16, [length], length, device, dtype, seed)


def _absorbed(
    N: int,
    H: int,
    valid: list[int],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    D = H * HEAD
    x = torch.randn(len(valid), N, D, generator=random)
    kv = torch.randn(len(valid), 120, 2, H, HEAD, generator=random)
    key_mask = torch.arange(120) < torch.tensor(valid)[:, None]
    q_weight, proj_weight = torch.randn(2, D, D, generator=random) * D**-0.5
    q_bias, proj_bias = torch.randn(2, D, generator=random)
    made = absorb(kv.to(dtype), key_mask, q_weight, q_bias, proj_weight, proj_bias, length)
    return x.to(device, dtype), *(each.to(device) for each in made)


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B images of N tokens at XL's width, for `launch.record`."""
    H, T = 16, 120
    with torch.device("meta"):
        q = torch.empty(B, N, H, HEAD, dtype=dtype)
        kv = torch.empty(B, T, 2, H, HEAD, dtype=dtype)
        key_mask = torch.empty(B, T, dtype=torch.bool)
        out, lse = cross_attention_triton(q, kv, key_mask)
        cross_attention_backward_triton(out, q, kv, key_mask, out, lse)
        for length in (16, 32, 64):
            keys = torch.empty(B, H * length, H * HEAD, dtype=dtype)
            absorbed_scores_triton(out, keys, torch.empty(B, H, length))


OPERATORS = (
    Operator(
        "cross_attention", SM80, cross_attention, cross_attention_ref, _example,
        production=_production,
        tables=("cross_attention", "cross_attention_backward_kv", "cross_attention_backward_q"),
    ),
    Operator(
        "cross_attention_absorbed", SM80,
        cross_attention_absorbed, cross_attention_absorbed_ref, _absorbed_example, trains=False,
        production=_absorbed_production,
    ),
)  # fmt: skip
PRODUCTS = (torch.ops.pixart_rt.cross_attention,)  # what activation checkpointing keeps
