"""A ControlNet-Transformer in plain PyTorch, float64, from its formulas: the oracle of ours.

PixArt-alpha (arXiv:2310.00426), Section 2.3 and A.9; the chained form as PixArt-delta's code runs
it. Works on a state dict with our names. Every block normalizes its own input; nothing is fused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normalized(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-6)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q [B, N, D], k and v [B, T, D], mask [B, T]."""
    out = torch.empty_like(q)
    K = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * K, (head + 1) * K)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(K)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        out[..., part] = torch.softmax(scores, dim=-1) @ v[..., part]
    return out


def block(state: State, name: str, x: Tensor, shared: Tensor, y: Tensor, mask: Tensor, heads: int):
    """One block: x [B, N, D], shared [B, 6, D], projected captions y [B, T, D]."""
    rows = state[f"{name}.scale_shift_table"] + shared
    b1, g1, a1, b2, g2, a2 = (rows[:, i : i + 1] for i in range(6))
    qkv = linear(state, f"{name}.attn.qkv", normalized(x) * (1 + g1) + b1)
    q, k, v = qkv.chunk(3, dim=-1)
    x = x + a1 * linear(state, f"{name}.attn.proj", attention(q, k, v, heads))
    q = linear(state, f"{name}.cross_attn.q_linear", x)
    k, v = linear(state, f"{name}.cross_attn.kv_linear", y).chunk(2, dim=-1)
    x = x + linear(state, f"{name}.cross_attn.proj", attention(q, k, v, heads, mask))
    hidden = linear(state, f"{name}.mlp.fc1", normalized(x) * (1 + g2) + b2)
    return x + a2 * linear(state, f"{name}.mlp.fc2", gelu(hidden))


def plain_controlnet(
    state: State,
    heads: int,
    variant: str,
    tokens: Tensor,
    pos_embed: Tensor,
    modulation: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    control: Tensor | None,
) -> Tensor:
    """The output [B, N, p·p·out_channels]. Without control, the model's own blocks alone."""
    state = {name: tensor.double() for name, tensor in state.items()}
    shared, embedded = modulation[:, :6].double(), modulation[:, 6:].double()
    hidden = gelu(linear(state, "y_proj.fc1", prompt_embeds.double()))
    y = linear(state, "y_proj.fc2", hidden)

    def embed(patches: Tensor) -> Tensor:
        return linear(state, "x_embedder", patches.double()) + pos_embed.double()

    def frozen(index: int, x: Tensor) -> Tensor:
        return block(state, f"blocks.{index}", x, shared, y, prompt_mask, heads)

    def copied(index: int, x: Tensor) -> Tensor:
        return block(state, f"copies.{index}.block", x, shared, y, prompt_mask, heads)

    def before(index: int) -> Tensor:
        return linear(state, f"copies.{index}.before_proj", c)

    def after(index: int, h: Tensor) -> Tensor:
        return linear(state, f"copies.{index}.after_proj", h)

    L = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    M = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("copies."))
    x = embed(tokens)
    if control is None:
        for i in range(L):
            x = frozen(i, x)
    elif variant == "parallel":
        c = embed(control)
        for i in range(L):
            beside = after(i, copied(i, x + before(i))) if i < M else 0
            x = frozen(i, x) + beside
    else:
        c = embed(control)
        x = frozen(0, x)
        h = x + before(0)
        for i in range(1, M + 1):
            h = copied(i - 1, h)
            x = frozen(i, x + after(i - 1, h))
        for i in range(M + 1, L):
            x = frozen(i, x)
    shift, scale = (state["final_layer.scale_shift_table"] + embedded).chunk(2, dim=1)
    return linear(state, "final_layer.linear", normalized(x) * (1 + scale) + shift)
