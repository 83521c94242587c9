"""DiT in plain PyTorch, float64, written from its paper: the oracle of ours.

Peebles & Xie, arXiv:2212.09748, Section 3.2 and Figure 3 (adaLN-Zero); positions and timestep
embedding as in the Transformer (arXiv:1706.03762). Works on a dict of tensors with DiT's names.
Only the sinusoid of the timestep is float32, as in DiT: at t = 999 the rounding of an angle shows
in the fifth digit of the output.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

State = dict[str, Tensor]


def random_state(
    *,
    heads: int = 2,
    layers: int = 3,
    classes: int = 10,
    side: int = 4,
    channels: int = 4,
    out_channels: int = 8,
    head_dim: int = 72,
    seed: int = 0,
) -> State:
    """A random DiT with patches of 2x2, float32, no tensor zero or small."""
    random = torch.Generator().manual_seed(seed)
    D = heads * head_dim

    def linear(name: str, inputs: int, outputs: int) -> State:
        return {
            f"{name}.weight": torch.randn(outputs, inputs, generator=random) / math.sqrt(inputs),
            f"{name}.bias": 0.3 * torch.randn(outputs, generator=random),
        }

    state = {
        "pos_embed": positions(D, side).float()[None],
        "x_embedder.proj.weight": torch.randn(D, channels, 2, 2, generator=random) / 4,
        "x_embedder.proj.bias": 0.3 * torch.randn(D, generator=random),
        "y_embedder.embedding_table.weight": torch.randn(classes + 1, D, generator=random),
        **linear("t_embedder.mlp.0", 256, D),
        **linear("t_embedder.mlp.2", D, D),
        **linear("final_layer.linear", D, 4 * out_channels),
        **linear("final_layer.adaLN_modulation.1", D, 2 * D),
    }
    for i in range(layers):
        state |= linear(f"blocks.{i}.attn.qkv", D, 3 * D)
        state |= linear(f"blocks.{i}.attn.proj", D, D)
        state |= linear(f"blocks.{i}.mlp.fc1", D, 4 * D)
        state |= linear(f"blocks.{i}.mlp.fc2", 4 * D, D)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", D, 6 * D)
    return state


def positions(width: int, side: int, step: float = 1.0) -> Tensor:
    """[side * side, width]: the column in the first half of the width, the row in the second."""
    quarter = width // 4
    table = torch.empty(side, side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for half, place in ((0, column), (1, row)):
                for i in range(quarter):
                    angle = place * step / 10000 ** (i / quarter)
                    table[row, column, 2 * half * quarter + i] = math.sin(angle)
                    table[row, column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return table.reshape(side * side, width)


class PlainDiT:
    """The model of a state dict. `blocks` keeps x after each block of the last call."""

    def __init__(self, state: State, heads: int) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.heads = heads
        self.blocks: list[Tensor] = []

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def condition(self, timestep: Tensor, labels: Tensor | None) -> Tensor:
        """c: the timestep's embedding and, with labels, theirs added."""
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        angle = timestep.float()[:, None] * frequency
        sinusoid = torch.cat([angle.cos(), angle.sin()], -1).double()
        hidden = self.linear("t_embedder.mlp.0", sinusoid)
        c = self.linear("t_embedder.mlp.2", hidden * torch.sigmoid(hidden))
        return c if labels is None else c + self.state["y_embedder.embedding_table.weight"][labels]

    def modulation(self, name: str, c: Tensor, count: int) -> tuple[Tensor, ...]:
        """`count` vectors [B, 1, D]."""
        rows = self.linear(f"{name}.adaLN_modulation.1", c * torch.sigmoid(c))
        return rows[:, None].chunk(count, dim=-1)

    def attention(self, name: str, x: Tensor) -> Tensor:
        D = x.shape[-1]
        qkv = self.linear(f"{name}.attn.qkv", x)
        out = torch.empty_like(x)
        K = D // self.heads
        for head in range(self.heads):
            q, k, v = (qkv[..., part * D + head * K :][..., :K] for part in range(3))
            weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(K), dim=-1)
            out[..., head * K : (head + 1) * K] = weights @ v
        return self.linear(f"{name}.attn.proj", out)

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        labels: Tensor | None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """latents [B, C, h, w] to [B, out_channels, h, w]."""
        B, _, h, w = latents.shape
        c = self.condition(timestep, labels)
        kernel, bias = self.state["x_embedder.proj.weight"], self.state["x_embedder.proj.bias"]
        x = torch.nn.functional.conv2d(latents.double(), kernel, bias, stride=2)
        x = x.flatten(2).transpose(1, 2) + (
            self.state["pos_embed"] if pos_embed is None else pos_embed
        )
        self.blocks = []
        layers = 1 + max(int(n.split(".")[1]) for n in self.state if n.startswith("blocks."))
        for i in range(layers):
            name = f"blocks.{i}"
            b1, g1, a1, b2, g2, a2 = self.modulation(name, c, 6)
            x = x + a1 * self.attention(name, normalized(x) * (1 + g1) + b1)
            hidden = self.linear(f"{name}.mlp.fc1", normalized(x) * (1 + g2) + b2)
            x = x + a2 * self.linear(f"{name}.mlp.fc2", gelu(hidden))
            self.blocks.append(x)
        shift, scale = self.modulation("final_layer", c, 2)
        out = self.linear("final_layer.linear", normalized(x) * (1 + scale) + shift)
        out = out.reshape(B, h // 2, w // 2, 2, 2, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h, w)


def normalized(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.fixture(scope="session")
def random_dit():
    """random_dit(**sizes): a state dict; see `random_state`."""
    return random_state


@pytest.fixture(scope="session")
def plain_dit():
    """plain_dit(state, heads): see `PlainDiT`."""
    return PlainDiT


@pytest.fixture(scope="session")
def plain_positions():
    """plain_positions(width, side, step): see `positions`."""
    return positions
