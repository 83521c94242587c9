"""Softmax attention for heads of 72 lanes, without padding them to 128: softmax(q·kᵀ/√K)·v.

B images, H heads, N queries, T keys, K lanes a head (72 in PixArt-alpha, arXiv:2310.00426). In
self-attention T = N, and q, k, v come packed from one matrix product: qkv is [B, N, 3, H, K], the
output [B, N, H·K]. The same kernel serves cross_attention.py, with q [B, N, H, K], kv
[B, T, 2, H, K] and a mask over keys. The backward is in attention_backward.py, how tiles are read
in attention_tiles.py.

Softmax runs over blocks of keys with a running maximum, in float32 and base 2 (FlashAttention,
arXiv:2205.14135). A tile never straddles two images, and N is no compile-time constant. Keys past
the image are in the last block only, which follows the loop.

Traffic: reads q once, k and v once for each tile of queries (from L2 as a rule), writes the output,
B·N·H·K elements, and B·H·N float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart_rt.kernels.attention_backward import (
    attention_backward_triton,
    attention_qkv_packed_backward_ref,
    lse_ref,
)
from pixart_rt.kernels.attention_choice import OWN, attend_by, chosen
from pixart_rt.kernels.attention_tiles import (
    HEAD,
    SM120,
    Config,
    add_weighted,
    configuration,
    load_rows,
    product,
    sources,
    store_rows,
    takes,
    takes_traced,
    zero_tile,
)
from pixart_rt.kernels.launch import SM80, SM90, Operator, ceil_div, direct, exporting, launch
from pixart_rt.kernels.triton_import import tl, triton

# Tiles, warps and stages by the compute capability they start at. Chosen from the compiler's
# resource report (docs/kernels.md: no spills, tensor cores, shared memory of the smallest member of
# the family), not from timings.
FORWARD: dict[tuple[int, int], Config] = {
    SM80: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 0},
    SM90: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
    SM120: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
}


def attention_ref(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's own scaled dot product attention; q [B, H, N, K], k and v [B, H, T, K].

    key_mask is [B, T] boolean, True where a key may be seen; every row needs one.
    """
    # The mask stays [B, 1, 1, T]: broadcast inside, never materialised per head or per query.
    bias = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_qkv_packed_ref(qkv: Tensor) -> Tensor:
    """attention_ref on a packed qkv [B, N, 3, H, K]; [B, N, H·K]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attention_ref(q, k, v).transpose(1, 2).flatten(2)


@triton.jit
def _attend(
    state, queries, keys, mask_ptr, image, first, count, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running maximum and sum, and the weighted values.

    `state` is (weighted values, sum, maximum), `keys` (source, head of the keys, of the values).
    """
    out, total, top = state
    k = load_rows(keys[0], image, first, count, keys[1], K, BLOCK, LAST)
    scores = product(queries, k)
    if LAST or mask_ptr is not None:
        rows = first + tl.arange(0, BLOCK)
        seen = rows < count
        if mask_ptr is not None:
            seen = tl.load(mask_ptr + image * count + rows, mask=seen, other=0) != 0
        # Finite, for a block may have no key that is seen: far below every score that fp16 data can
        # make, so that a later block's maximum takes all weight from it.
        scores = tl.where(seen[None, :], scores, -1e30)
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v = load_rows(keys[0], image, first, count, keys[2], K, BLOCK, LAST)
    shrunk = (out[0] * shrink[:, None], out[1] * shrink[:, None])
    out = add_weighted(p.to(v[0].dtype), v, shrunk)
    return out, total, higher


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _attention_kernel(
    q_src, q_rest, kv_src, kv_rest, mask_ptr, layout, num_queries, num_keys,
    out_ptr, lse_ptr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one image.

    `layout` is (first heads of q, k and v in their buffers, strides of q's and of kv's tokens).
    mask_ptr is None where every key is seen.
    """
    q_head, k_head, v_head, q_stride, kv_stride = layout
    scale = 1.4426950408889634 / K**0.5  # with log2(e), for exp2
    image = tl.program_id(2).to(tl.int64)  # int64: the offset of an image can pass 2**31
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    queries = load_rows(
        (q_src, q_rest, q_stride), image, first, num_queries, q_head + head, K, BLOCK_M, True
    )
    keys = ((kv_src, kv_rest, kv_stride), k_head + head, v_head + head)
    state = (
        zero_tile(BLOCK_M), tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )  # fmt: skip
    last = (num_keys - 1) // BLOCK_N * BLOCK_N
    for at in range(0, last, BLOCK_N):
        state = _attend(
            state, queries, keys, mask_ptr, image, at, num_keys, scale, K, BLOCK_N, False
        )
    if kv_rest is not None:  # a loop of one round: see attention_tiles.py
        for at in tl.range(last, num_keys, BLOCK_N, num_stages=1):
            state = _attend(
                state, queries, keys, mask_ptr, image, at, num_keys, scale, K, BLOCK_N, True
            )
    else:
        state = _attend(
            state, queries, keys, mask_ptr, image, last, num_keys, scale, K, BLOCK_N, True
        )
    out, total, top = state
    share = 1.0 / total[:, None]
    out = (out[0] * share, out[1] * share)
    store_rows(out_ptr, out, image, first, num_queries, num_heads * K, head, K, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    lse = (top + tl.log2(total)) * 0.6931471805599453  # back from base 2
    tl.store(lse_ptr + (image * num_heads + head) * num_queries + rows, lse, rows < num_queries)


def attend(
    op: str,
    q: Tensor,
    kv: Tensor,
    heads: tuple[int, int, int],
    num_heads: int,
    key_mask: Tensor | None,
    tuned: Config | None,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K], log-sum-exp [B, H, N]) of heads in buffers [B, tokens, heads, K].

    `heads` are the first ones of q in its buffer, and of k and v in theirs. `tuned` replaces
    entries of the configuration.
    """
    B, N, _, K = q.shape
    T, H = kv.shape[1], num_heads
    out = q.new_empty(B, N, H * K)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    chosen, on = configuration(op, (B * H, N), FORWARD, tuned, (q, kv))
    launch(
        _attention_kernel, (ceil_div(N, chosen["BLOCK_M"]), H, B),
        *sources(q, chosen["BLOCK_M"], on), *sources(kv, chosen["BLOCK_N"], on), key_mask,
        (*heads, q.stride(1), kv.stride(1)), N, T, out, lse,
        K=K, **chosen,
    )  # fmt: skip
    return out, lse


def attention_triton(qkv: Tensor, tuned: Config | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K], log-sum-exp [B, H, N]) of a packed qkv [B, N, 3, H, K]."""
    H, buffer = qkv.shape[3], qkv.flatten(2, 3)
    return attend("attention", buffer, buffer, (0, H, 2 * H), H, None, tuned)


@torch.library.custom_op("pixart_rt::attention_qkv_packed", mutates_args=())
def attention_qkv_packed_op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K] in qkv's dtype, log-sum-exp [B, H, N] in float32 or wider)."""
    if takes("attention_qkv_packed", qkv):
        return attention_triton(qkv.contiguous())
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return attention_qkv_packed_ref(qkv).contiguous(), lse_ref(q, k)


@attention_qkv_packed_op.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, N, _, H, K = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, N, H * K), qkv.new_empty(B, H, N, dtype=wide)


@torch.library.custom_op("pixart_rt::attention_qkv_packed_backward", mutates_args=())
def attention_qkv_packed_backward_op(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dqkv [B, N, 3, H, K], packed as qkv is."""
    qkv = qkv.contiguous()
    if not takes("attention_qkv_packed", qkv):
        return attention_qkv_packed_backward_ref(dout, qkv, out, lse)
    return attention_backward_triton(dout, qkv, out.contiguous(), lse.contiguous())


@attention_qkv_packed_backward_op.register_fake
def _(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dout: Tensor, *_: Any) -> Tensor:
    dqkv: Tensor = attention_qkv_packed_backward_op(dout, *ctx.saved_tensors)
    return dqkv


attention_qkv_packed_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("pixart_rt::attention_qkv_packed_forward", mutates_args=())
def attention_qkv_packed_forward(qkv: Tensor) -> Tensor:
    """Self-attention without a gradient, in compiled graphs: the tables choose at every call."""
    H, N = qkv.shape[3], qkv.shape[1]
    name = chosen("attention_qkv_packed", qkv, (qkv.shape[0] * H, N))
    if name == OWN:
        return attention_qkv_packed_op(qkv)[0]
    return _by(name, qkv).contiguous()


@attention_qkv_packed_forward.register_fake
def _(qkv: Tensor) -> Tensor:
    B, N, _, H, K = qkv.shape
    return qkv.new_empty(B, N, H * K)


def _by(implementation: str, qkv: Tensor) -> Tensor:
    """Self-attention by one of PyTorch's implementations, [B, N, H·K]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return attend_by(implementation, q, k, v).transpose(1, 2).flatten(2)


def attention_qkv_packed(qkv: Tensor) -> Tensor:
    """Self-attention of qkv [B, N, 3, H, K]: [B, N, H·K]. Differentiable in qkv.

    Where no kernel of ours runs, PyTorch differentiates its own attention, which needs no
    log-sum-exp of ours. A compiled graph that is differentiated always has ours if it runs.
    """
    op = "attention_qkv_packed"
    if torch.compiler.is_compiling():
        if exporting():  # an exporter takes the operator apart, or keeps it
            return attention_qkv_packed_op(qkv)[0]
        if not takes_traced(op, qkv):
            return attention_qkv_packed_ref(qkv)
        if not (torch.is_grad_enabled() and qkv.requires_grad):
            return attention_qkv_packed_forward(qkv)
        return attention_qkv_packed_op(qkv)[0]
    name = chosen(op, qkv, (qkv.shape[0] * qkv.shape[3], qkv.shape[1]))
    if name != OWN:
        return _by(name, qkv)
    if not takes(op, qkv):
        return attention_qkv_packed_ref(qkv)
    if direct(qkv):
        return attention_triton(qkv.contiguous())[0]
    return attention_qkv_packed_op(qkv)[0]


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size, two blocks of keys and a rest, and an outlier channel."""
    return _packed(3, 150, 2, device, dtype, seed)


def _production(
    device: torch.device, dtype: torch.dtype, seed: int
) -> Iterable[tuple[Tensor, ...]]:
    """XL's heads, and more than two of the largest tiles."""
    yield _packed(2, 300, 16, device, dtype, seed)


def _packed(
    B: int, N: int, H: int, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, N, 3, H, HEAD, generator=random)
    qkv[:, :, :2, :, 5] *= 8
    return (qkv.to(device, dtype),)


def compile_example(dtype: torch.dtype, B: int = 2, N: int = 4096) -> None:
    """Every launch of this file for B images of N tokens at XL's width, for `launch.record`."""
    qkv = torch.empty(B, N, 3, 16, HEAD, dtype=dtype, device="meta")
    out, lse = attention_triton(qkv)
    attention_backward_triton(out, qkv, out, lse)


OPERATORS = (
    Operator(
        "attention_qkv_packed", SM80, attention_qkv_packed, attention_qkv_packed_ref, _example,
        production=_production,
        tables=("attention", "attention_backward_kv", "attention_backward_q"),
    ),
)  # fmt: skip
PRODUCTS = (torch.ops.pixart_rt.attention_qkv_packed,)  # what activation checkpointing keeps
