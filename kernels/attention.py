"""Softmax attention for heads of 72 lanes, without padding them to 128: softmax(q·kᵀ/√K)·v.

B images, H heads, N queries, T keys, K lanes a head (72 in PixArt-alpha, arXiv:2310.00426). In
self-attention T = N, and q, k, v come packed from one matrix product: qkv is [B, N, 3, H, K], the
output [B, N, H·K]. The same kernels serve cross_attention.py, with q [B, N, H, K], kv
[B, T, 2, H, K] and a mask over keys.

A head is 64 + 16 lanes, 80 of which the tensor cores work on where a power of two would be 128. The
last 8 lanes belong to the next head: they are zeroed once, in the operand that stays (the queries
of the forward), so that scores are exact, and the accumulators that they reach are not stored. So
nothing is masked in the loop; rows past the image and lanes past the tensor are masked in the last
block, which follows the loop. What the spare lanes hold must be finite.

Softmax runs over blocks of keys with a running maximum, in float32 and base 2 (FlashAttention,
arXiv:2205.14135); the backward recomputes scores from the log-sum-exp of each row and takes two
passes, one over keys and one over queries (arXiv:2307.08691), without atomics: equal inputs give
equal gradients. A tile never straddles two images, and N is no compile-time constant.

Traffic: reads q once, k and v once for each tile of queries (from L2 as a rule), writes the output,
B·N·H·K elements, and B·H·N float32. From compute capability 9.0 on, tiles come by tensor
descriptors (TMA), which read zeros past the tensor; before, by pointers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pixart_rt.kernels.launch import SM80, SM90, Operator, capability, config, launch, runs_triton

HEAD = 72  # the only head width the kernels take; others run the reference
SM120 = (12, 0)
LOG2E = 1.4426950408889634
# Queries that a program of the masked dK/dV pass adds up, whole tiles: T = 120 alone fills no GPU.
SPLIT = 512
REF_QUERIES = 256  # queries at a time where plain PyTorch forms the scores

Config = dict[str, int]
# Tiles, warps and stages by the compute capability they start at. Chosen from the compiler's
# resource report (docs/kernels.md: no spills, tensor cores, shared memory of the smallest member of
# the family), not from timings.
FORWARD: dict[tuple[int, int], Config] = {
    SM80: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 0},
    SM90: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
    SM120: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
}
BACKWARD_KV: dict[tuple[int, int], Config] = {
    SM80: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 0},
    SM90: {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 1},
    # Descriptors spill here (528 bytes) where pointers do not.
    SM120: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 0},
}
BACKWARD_Q: dict[tuple[int, int], Config] = {
    SM80: {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 0},
    SM90: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "DESCRIPTORS": 1},
    SM120: {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "DESCRIPTORS": 1},
}
# float32 products are exact here ("ieee"), without tensor cores: for tests. See `takes`.
FLOAT32: Config = {
    "BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "DESCRIPTORS": 0,
}  # fmt: skip
DELTA = {"BLOCK_M": 64, "num_warps": 4}


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


def scores_ref(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """q·kᵀ/√K in float32 or wider, -inf where a key is masked; [B, H, N, T]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * (1 / math.sqrt(q.shape[-1]))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -math.inf)
    return scores


def lse_ref(q: Tensor, k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """log(sum of exp) of each query's scores, [B, H, N], float32 or wider."""
    chunks = q.split(REF_QUERIES, 2)
    return torch.cat([scores_ref(chunk, k, key_mask).logsumexp(-1) for chunk in chunks], 2)


def attention_backward_ref(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the saved log-sum-exp; all [B, H, tokens, K], and so are dout and out."""
    wide = lse.dtype
    scale = 1 / math.sqrt(q.shape[-1])
    k_wide, v_wide = k.to(wide), v.to(wide)
    dk, dv = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    dq = []
    parts = [each.split(REF_QUERIES, 2) for each in (dout, q, out, lse)]
    for do, queries, o, total in zip(*parts, strict=True):
        do = do.to(wide)
        p = (scores_ref(queries, k, key_mask) - total[..., None]).exp()
        delta = (do * o.to(wide)).sum(-1, keepdim=True)
        ds = p * (do @ v_wide.mT - delta) * scale
        dq.append(ds @ k_wide)
        dk += ds.mT @ queries.to(wide)
        dv += p.mT @ do
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@triton.jit
def load_rows(
    main, rest, image, first, count, stride, head,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows first..first+BLOCK-1 of a head of one image: lanes 0 to 63, and lanes 64 to 79.

    EXACT zeroes the lanes that belong to the next head, and reads nothing past the tensor; rows
    past the image are then zero by pointers, the next image's (or zero) by descriptors. Without it
    all rows must lie in the image, and in the tensor even with the spare lanes.
    """
    lanes = tl.arange(0, 16)
    if DESCRIPTORS:
        row = (image * count + first).to(tl.int32)
        wide = main.load([row, head * K])
        narrow = rest.load([row, head * K + 64])
        if EXACT:
            narrow = tl.where(lanes[None, :] < K - 64, narrow, tl.zeros_like(narrow))
    else:
        # The 64-bit part of the offset is one number for the tile; what varies fits in 32 bits.
        start = main + (image * count + first) * stride + head * K
        rows = tl.arange(0, BLOCK)
        pointers = start + rows[:, None] * stride
        if EXACT:
            inside = (first + rows < count)[:, None]
            wide = tl.load(pointers + tl.arange(0, 64)[None, :], mask=inside, other=0.0)
            mine = inside & (lanes[None, :] < K - 64)
            narrow = tl.load(pointers + 64 + lanes[None, :], mask=mine, other=0.0)
        else:
            wide = tl.load(pointers + tl.arange(0, 64)[None, :])
            narrow = tl.load(pointers + 64 + lanes[None, :])
    return wide, narrow


@triton.jit
def store_rows(
    out_ptr, wide, narrow, image, first, count, stride, head,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The counterpart of load_rows: the head's own lanes, and rows of this image only."""
    rows, lanes = tl.arange(0, BLOCK), tl.arange(0, 16)
    dtype = out_ptr.dtype.element_ty
    pointers = out_ptr + (image * count + first) * stride + head * K + rows[:, None] * stride
    inside = (first + rows < count)[:, None]
    tl.store(pointers + tl.arange(0, 64)[None, :], wide.to(dtype), mask=inside)
    mine = inside & (lanes[None, :] < K - 64)
    tl.store(pointers + 64 + lanes[None, :], narrow.to(dtype), mask=mine)


@triton.jit
def load_keys(
    k, k_rest, mask_ptr, image, first, count, stride, head,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Keys, whose first spare lane says, MASKED, whether a key is seen: 0, else -2**15.

    Queries hold 2**15 there, so an unseen key's score is below all others by 2**30: far more than
    any that fp16 data can make of an exponential other than 0, and no number passes fp16's range.
    """
    wide, narrow = load_rows(
        k, k_rest, image, first, count, stride, head, K, BLOCK, DESCRIPTORS, EXACT
    )
    if MASKED:
        rows, lanes = first + tl.arange(0, BLOCK), tl.arange(0, 16)
        seen = tl.load(mask_ptr + image * count + rows, mask=rows < count, other=0)
        bias = tl.where(seen != 0, 0.0, -32768.0).to(narrow.dtype)
        narrow = tl.where(lanes[None, :] == K - 64, bias[:, None], narrow)
    return wide, narrow


@triton.jit
def load_queries(
    q, q_rest, image, first, count, stride, head,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries that stay in a pass over keys: exact, with the lane that load_keys answers to."""
    wide, narrow = load_rows(
        q, q_rest, image, first, count, stride, head, K, BLOCK, DESCRIPTORS, True
    )
    if MASKED:
        lanes = tl.arange(0, 16)
        marked = tl.full(narrow.shape, 32768.0, narrow.dtype)
        narrow = tl.where(lanes[None, :] == K - 64, marked, narrow)
    return wide, narrow


@triton.jit
def product(a, a_rest, b, b_rest):
    """a·bᵀ over 64 + 16 lanes, float32. "ieee" concerns float32 operands: no tf32."""
    wide = tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.dot(a_rest, tl.trans(b_rest), wide, input_precision="ieee")


@triton.jit
def _attend(
    out, out_rest, total, top, q, q_tail, k_src, k_rest, v_src, v_rest, mask_ptr,
    image, first, count, stride, head, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running maximum and sum, and the weighted values."""
    k, k_tail = load_keys(
        k_src, k_rest, mask_ptr, image, first, count, stride, head,
        K, BLOCK, DESCRIPTORS, MASKED, LAST,
    )  # fmt: skip
    scores = product(q, q_tail, k, k_tail)
    if LAST and not MASKED:  # the mask's lane already says so
        inside = first + tl.arange(0, BLOCK) < count
        scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    v, v_tail = load_rows(
        v_src, v_rest, image, first, count, stride, head, K, BLOCK, DESCRIPTORS, LAST
    )
    p = p.to(v.dtype)
    out = tl.dot(p, v, out * shrink[:, None], input_precision="ieee")
    out_rest = tl.dot(p, v_tail, out_rest * shrink[:, None], input_precision="ieee")
    return out, out_rest, total, higher


@triton.jit
def _attention_kernel(
    q_src, q_rest, k_src, k_rest, v_src, v_rest, mask_ptr,
    scale, num_queries, num_keys, q_stride, kv_stride,
    out_ptr, lse_ptr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one image. `scale` includes log2(e); strides are of rows."""
    image = tl.program_id(2).to(tl.int64)  # int64: the offset of an image can pass 2**31
    head = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_M
    q, q_tail = load_queries(
        q_src, q_rest, image, first, num_queries, q_stride, head, K, BLOCK_M, DESCRIPTORS, MASKED
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, 64], tl.float32)
    out_rest = tl.zeros([BLOCK_M, 16], tl.float32)
    last = (num_keys - 1) // BLOCK_N * BLOCK_N
    for at in range(0, last, BLOCK_N):
        out, out_rest, total, top = _attend(
            out, out_rest, total, top, q, q_tail, k_src, k_rest, v_src, v_rest, mask_ptr,
            image, at, num_keys, kv_stride, head, scale, K, BLOCK_N, DESCRIPTORS, MASKED, False,
        )  # fmt: skip
    out, out_rest, total, top = _attend(
        out, out_rest, total, top, q, q_tail, k_src, k_rest, v_src, v_rest, mask_ptr,
        image, last, num_keys, kv_stride, head, scale, K, BLOCK_N, DESCRIPTORS, MASKED, True,
    )  # fmt: skip
    num_heads = tl.num_programs(1)
    share = 1.0 / total[:, None]
    store_rows(
        out_ptr, out * share, out_rest * share, image, first, num_queries, num_heads * K, head,
        K, BLOCK_M,
    )  # fmt: skip
    rows = first + tl.arange(0, BLOCK_M)
    lse = (top + tl.log2(total)) * 0.6931471805599453  # back from base 2
    tl.store(lse_ptr + (image * num_heads + head) * num_queries + rows, lse, rows < num_queries)


@triton.jit
def _delta_kernel(
    dout_ptr, out_ptr, num_queries, delta_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta = sum of dout·out over a head's lanes: what softmax's backward subtracts."""
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    do, do_tail = load_rows(
        dout_ptr, dout_ptr, image, first, num_queries, num_heads * K, head, K, BLOCK_M, False, True
    )
    o, o_tail = load_rows(
        out_ptr, out_ptr, image, first, num_queries, num_heads * K, head, K, BLOCK_M, False, True
    )
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + (image * num_heads + head) * num_queries + rows, delta, rows < num_queries)


@triton.jit
def _backward_queries(
    dk, dk_rest, dv, dv_rest, k, k_tail, v, v_tail, seen, q_src, q_rest, dout_src, dout_rest,
    lse_ptr, delta_ptr, image, first, count, q_stride, dout_stride, head, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a block of keys and values."""
    q, q_tail = load_rows(
        q_src, q_rest, image, first, count, q_stride, head, K, BLOCK, DESCRIPTORS, LAST
    )
    rows = first + tl.arange(0, BLOCK)
    if LAST:  # exp2(-inf) makes nothing of rows past the image, whatever a descriptor read there
        lse = tl.load(lse_ptr + rows, mask=rows < count, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < count, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    scores = product(k, k_tail, q, q_tail)  # transposed: [keys, queries]
    p = tl.exp2(scores * scale - (lse * 1.4426950408889634)[None, :])
    if MASKED:
        p = tl.where(seen[:, None], p, 0.0)
    do, do_tail = load_rows(
        dout_src, dout_rest, image, first, count, dout_stride, head, K, BLOCK, DESCRIPTORS, LAST
    )
    rounded = p.to(do.dtype)
    dv = tl.dot(rounded, do, dv, input_precision="ieee")
    dv_rest = tl.dot(rounded, do_tail, dv_rest, input_precision="ieee")
    ds = p * (product(v, v_tail, do, do_tail) - delta[None, :])
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk_rest = tl.dot(ds, q_tail, dk_rest, input_precision="ieee")
    return dk, dk_rest, dv, dv_rest


@triton.jit
def _attention_backward_kv_kernel(
    dout_src, dout_rest, q_src, q_rest, k_src, k_rest, v_src, v_rest, mask_ptr, lse_ptr, delta_ptr,
    scale, num_queries, num_keys, q_stride, kv_stride, dkv_stride,
    dk_ptr, dv_ptr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values from all queries, or, MASKED, from SPLIT of them.

    The weights of keys past the image may be anything: they reach only their own rows, which are
    not stored.
    """
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(num_keys, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    k, k_tail = load_rows(
        k_src, k_rest, image, first, num_keys, kv_stride, head, K, BLOCK_N, DESCRIPTORS, True
    )
    v, v_tail = load_rows(
        v_src, v_rest, image, first, num_keys, kv_stride, head, K, BLOCK_N, DESCRIPTORS, True
    )
    rows = first + tl.arange(0, BLOCK_N)
    seen = rows < num_keys
    if MASKED:
        seen = tl.load(mask_ptr + image * num_keys + rows, mask=seen, other=0) != 0
    lse_ptr += (image * num_heads + head) * num_queries
    delta_ptr += (image * num_heads + head) * num_queries
    dk = tl.zeros([BLOCK_N, 64], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, 16], tl.float32)
    dv = tl.zeros([BLOCK_N, 64], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, 16], tl.float32)
    if MASKED:
        split = tl.program_id(0) // tiles
        for at in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, num_queries), BLOCK_M):
            dk, dk_rest, dv, dv_rest = _backward_queries(
                dk, dk_rest, dv, dv_rest, k, k_tail, v, v_tail, seen,
                q_src, q_rest, dout_src, dout_rest, lse_ptr, delta_ptr,
                image, at, num_queries, q_stride, num_heads * K, head, scale,
                K, BLOCK_M, DESCRIPTORS, MASKED, True,
            )  # fmt: skip
        image += split * tl.num_programs(2)  # the sums of a split lie behind those of another
    else:
        last = (num_queries - 1) // BLOCK_M * BLOCK_M
        for at in range(0, last, BLOCK_M):
            dk, dk_rest, dv, dv_rest = _backward_queries(
                dk, dk_rest, dv, dv_rest, k, k_tail, v, v_tail, seen,
                q_src, q_rest, dout_src, dout_rest, lse_ptr, delta_ptr,
                image, at, num_queries, q_stride, num_heads * K, head, scale,
                K, BLOCK_M, DESCRIPTORS, MASKED, False,
            )  # fmt: skip
        dk, dk_rest, dv, dv_rest = _backward_queries(
            dk, dk_rest, dv, dv_rest, k, k_tail, v, v_tail, seen,
            q_src, q_rest, dout_src, dout_rest, lse_ptr, delta_ptr,
            image, last, num_queries, q_stride, num_heads * K, head, scale,
            K, BLOCK_M, DESCRIPTORS, MASKED, True,
        )  # fmt: skip
    natural = scale * 0.6931471805599453
    store_rows(
        dk_ptr, dk * natural, dk_rest * natural, image, first, num_keys, dkv_stride, head,
        K, BLOCK_N,
    )  # fmt: skip
    store_rows(dv_ptr, dv, dv_rest, image, first, num_keys, dkv_stride, head, K, BLOCK_N)


@triton.jit
def _backward_keys(
    dq, dq_rest, q, q_tail, do, do_tail, lse, delta, k_src, k_rest, v_src, v_rest, mask_ptr,
    image, first, count, stride, head, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a block of queries."""
    k, k_tail = load_keys(
        k_src, k_rest, mask_ptr, image, first, count, stride, head,
        K, BLOCK, DESCRIPTORS, MASKED, LAST,
    )  # fmt: skip
    p = tl.exp2(product(q, q_tail, k, k_tail) * scale - lse[:, None])
    if LAST and not MASKED:
        inside = first + tl.arange(0, BLOCK) < count
        p = tl.where(inside[None, :], p, 0.0)
    v, v_tail = load_rows(
        v_src, v_rest, image, first, count, stride, head, K, BLOCK, DESCRIPTORS, LAST
    )
    ds = p * (product(do, do_tail, v, v_tail) - delta[:, None])
    ds = ds.to(k.dtype)
    dq = tl.dot(ds, k, dq, input_precision="ieee")
    dq_rest = tl.dot(ds, k_tail, dq_rest, input_precision="ieee")
    return dq, dq_rest


@triton.jit
def _attention_backward_q_kernel(
    dout_src, dout_rest, q_src, q_rest, k_src, k_rest, v_src, v_rest, mask_ptr, lse_ptr, delta_ptr,
    scale, num_queries, num_keys, q_stride, kv_stride, dq_stride,
    dq_ptr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries from all keys."""
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    q, q_tail = load_queries(
        q_src, q_rest, image, first, num_queries, q_stride, head, K, BLOCK_M, DESCRIPTORS, MASKED
    )
    do, do_tail = load_rows(
        dout_src, dout_rest, image, first, num_queries, num_heads * K, head,
        K, BLOCK_M, DESCRIPTORS, True,
    )  # fmt: skip
    rows = first + tl.arange(0, BLOCK_M)
    stats = (image * num_heads + head) * num_queries + rows
    # Rows past the image are not stored; +inf keeps their weights 0 rather than infinite.
    lse = tl.load(lse_ptr + stats, mask=rows < num_queries, other=float("inf"))
    lse *= 1.4426950408889634
    delta = tl.load(delta_ptr + stats, mask=rows < num_queries, other=0.0)
    dq = tl.zeros([BLOCK_M, 64], tl.float32)
    dq_rest = tl.zeros([BLOCK_M, 16], tl.float32)
    last = (num_keys - 1) // BLOCK_N * BLOCK_N
    for at in range(0, last, BLOCK_N):
        dq, dq_rest = _backward_keys(
            dq, dq_rest, q, q_tail, do, do_tail, lse, delta, k_src, k_rest, v_src, v_rest,
            mask_ptr, image, at, num_keys, kv_stride, head, scale,
            K, BLOCK_N, DESCRIPTORS, MASKED, False,
        )  # fmt: skip
    dq, dq_rest = _backward_keys(
        dq, dq_rest, q, q_tail, do, do_tail, lse, delta, k_src, k_rest, v_src, v_rest,
        mask_ptr, image, last, num_keys, kv_stride, head, scale,
        K, BLOCK_N, DESCRIPTORS, MASKED, True,
    )  # fmt: skip
    natural = scale * 0.6931471805599453
    store_rows(
        dq_ptr, dq * natural, dq_rest * natural, image, first, num_queries, dq_stride, head,
        K, BLOCK_M,
    )  # fmt: skip


def newest(table: Mapping[tuple[int, int], Config], like: Tensor) -> Config:
    """The entry of the latest compute capability that the GPU of `like` has reached."""
    return table[max(least for least in table if least <= max(capability(like), SM80))]


def _config(
    op: str, q: Tensor, table: Mapping[tuple[int, int], Config], tuned: Config | None
) -> Config:
    default = FLOAT32 if q.dtype == torch.float32 else newest(table, q)
    chosen = {**config(op, q, (q.shape[0] * q.shape[2], q.shape[1]), default), **(tuned or {})}
    # Descriptors need the hardware, and addresses of 16 bytes' alignment.
    aligned = q.data_ptr() % 16 == 0 and HEAD * q.shape[2] * q.element_size() % 16 == 0
    if capability(q) < SM90 or not aligned:
        chosen["DESCRIPTORS"] = 0
    return chosen


def sources(x: Tensor, block: int, descriptors: int) -> tuple[Any, Any]:
    """How a kernel reads x [B, tokens, H, K]: one pointer twice, or blocks of 64 and 16 lanes."""
    if not descriptors:
        return x, x
    shape = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]]  # past the heads it reads zeros
    strides = [x.stride(1), 1]
    wide = TensorDescriptor(x, shape, strides, [block, 64])
    return wide, TensorDescriptor(x, shape, strides, [block, 16])


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    tuned: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K], log-sum-exp [B, H, N]) of q [B, N, H, K], k and v [B, T, H, K].

    q, k and v may be views of packed tensors: rows apart by any stride, heads adjacent. `tuned`
    replaces entries of the configuration.
    """
    B, N, H, K = q.shape
    out = q.new_empty(B, N, H * K)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    name = "attention" if key_mask is None else "cross_attention"
    chosen = _config(name, q, FORWARD, tuned)
    on, M, T = chosen["DESCRIPTORS"], chosen["BLOCK_M"], chosen["BLOCK_N"]
    launch(
        _attention_kernel, (triton.cdiv(N, M), H, B),
        *sources(q, M, on), *sources(k, T, on), *sources(v, T, on), key_mask,
        LOG2E / math.sqrt(K), N, k.shape[1], q.stride(1), k.stride(1), out, lse,
        K=K, MASKED=key_mask is not None, **chosen,
    )  # fmt: skip
    return out, lse


def attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    key_mask: Tensor | None = None,
    tuned: Config | None = None,
) -> None:
    """Write the gradients to dq, dk and dv, which have the shapes of q, k and v.

    With a mask dk and dv gain a first dimension, the number of `splits`, and are float32: sums over
    parts of the queries, which the caller adds up.
    """
    (B, N, H, K), T = q.shape, k.shape[1]
    masked = key_mask is not None
    dout = dout.contiguous()
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel, (triton.cdiv(N, DELTA["BLOCK_M"]), H, B), dout, out, N, delta, K=K, **DELTA
    )
    dout = dout.view(B, N, H, K)
    name = "cross_attention" if masked else "attention"
    for op, table in ((f"{name}_backward_kv", BACKWARD_KV), (f"{name}_backward_q", BACKWARD_Q)):
        chosen = _config(op, q, table, tuned)
        on, block_m, block_n = chosen["DESCRIPTORS"], chosen["BLOCK_M"], chosen["BLOCK_N"]
        inputs = (
            *sources(dout, block_m, on), *sources(q, block_m, on),
            *sources(k, block_n, on), *sources(v, block_n, on), key_mask, lse, delta,
            LOG2E / math.sqrt(K), N, T, q.stride(1), k.stride(1),
        )  # fmt: skip
        if table is BACKWARD_KV:
            programs = triton.cdiv(T, block_n) * (splits(N) if masked else 1)
            launch(
                _attention_backward_kv_kernel, (programs, H, B), *inputs, dk.stride(-3), dk, dv,
                K=K, SPLIT=SPLIT, MASKED=masked, **chosen,
            )  # fmt: skip
        else:
            launch(
                _attention_backward_q_kernel, (triton.cdiv(N, block_m), H, B),
                *inputs, dq.stride(1), dq, K=K, MASKED=masked, **chosen,
            )  # fmt: skip


def splits(num_queries: int) -> int:
    """How many parts the masked dK/dV pass divides the queries into."""
    return triton.cdiv(num_queries, SPLIT)


def takes(op: str, x: Tensor) -> bool:
    """Whether the kernels run on x [..., K]: its device, head width and dtype."""
    known = x.dtype in (torch.float16, torch.bfloat16)
    # On a GPU float32 is PyTorch's: on sm_80 the forward spills 770 bytes or more at every tile
    # tried without tensor cores, and 150 or more by three tf32 products. The interpreter takes it.
    known |= x.dtype == torch.float32 and not x.is_cuda
    return x.shape[-1] == HEAD and known and runs_triton(op, x, SM80)


@torch.library.custom_op("pixart_rt::attention_qkv_packed", mutates_args=())
def attention_qkv_packed_op(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, H·K] in qkv's dtype, log-sum-exp [B, H, N] in float32 or wider)."""
    if takes("attention_qkv_packed", qkv):
        return attention_triton(*qkv.contiguous().unbind(2))
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
    dqkv = torch.empty_like(qkv)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    attention_backward_triton(dout, q, k, v, out.contiguous(), lse.contiguous(), dq, dk, dv)
    return dqkv


def attention_qkv_packed_backward_ref(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """attention_backward_ref in the packed layout."""
    H, K = qkv.shape[3:]
    dout, out = (each.unflatten(2, (H, K)).transpose(1, 2) for each in (dout, out))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gradients = attention_backward_ref(dout, q, k, v, out, lse)
    return torch.stack([each.transpose(1, 2) for each in gradients], 2)


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


def attention_qkv_packed(qkv: Tensor) -> Tensor:
    """Self-attention of qkv [B, N, 3, H, K]: [B, N, H·K]. Differentiable in qkv."""
    # PyTorch differentiates its own attention, which needs no log-sum-exp of ours; a compiler,
    # which cannot ask the device, takes the operator.
    if not torch.compiler.is_compiling() and not takes("attention_qkv_packed", qkv):
        return attention_qkv_packed_ref(qkv)
    out: Tensor = attention_qkv_packed_op(qkv)[0]
    return out


def _example(device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """Three images of a ragged size, two blocks of keys and a rest, and an outlier channel."""
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, 150, 3, 2, HEAD, generator=random)
    qkv[:, :, :2, :, 5] *= 8
    return (qkv.to(device, dtype),)


def compile_example(dtype: torch.dtype) -> None:
    """Every launch of this file at 1024 pixels, for `launch.record`."""
    qkv = torch.empty(2, 4096, 3, 16, HEAD, dtype=dtype)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), torch.empty_like(qkv).unbind(2)
    out, lse = attention_triton(q, k, v)
    attention_backward_triton(out, q, k, v, out, lse, dq, dk, dv)


OPERATORS = (
    Operator(
        "attention_qkv_packed", SM80, attention_qkv_packed, attention_qkv_packed_ref, _example
    ),
)
PRODUCTS = (torch.ops.pixart_rt.attention_qkv_packed,)  # what activation checkpointing keeps
