"""The gradients of attention.py's softmax attention, for heads of 72 lanes.

B images, H heads, N queries, T keys, K lanes a head. The backward recomputes scores from the
log-sum-exp of each row and takes two passes, one over keys and one over queries
(arXiv:2307.08691), without atomics: equal inputs give equal gradients.

    P = exp(q·kᵀ/√K - lse)     dV = Pᵀ·dO     dS = P∘(dO·vᵀ - delta)/√K     dQ = dS·k     dK = dSᵀ·q

with delta = rowsum(dO∘O). Traffic: each pass reads q, k, v and dO once and again for every tile of
its own, from L2 as a rule; delta reads dO and O.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixart_rt.kernels.attention_tiles import (
    SM120,
    Config,
    add_weighted,
    configuration,
    load_rows,
    product,
    sources,
    store_rows,
    zero_tile,
)
from pixart_rt.kernels.launch import SM80, SM90, ceil_div, launch
from pixart_rt.kernels.triton_import import tl, triton

# Queries that a program of the masked dK/dV pass adds up, whole tiles: T = 120 alone fills no GPU.
SPLIT = 512
REF_QUERIES = 256  # queries at a time where plain PyTorch forms the scores
# Chosen as those of attention.py.
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
DELTA = {"BLOCK_M": 64, "num_warps": 4}


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


def attention_qkv_packed_backward_ref(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """attention_backward_ref in the packed layout."""
    H, K = qkv.shape[3:]
    dout, out = (each.unflatten(2, (H, K)).transpose(1, 2) for each in (dout, out))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    gradients = attention_backward_ref(dout, q, k, v, out, lse)
    return torch.stack([each.transpose(1, 2) for each in gradients], 2)


@triton.jit(do_not_specialize=["num_queries"])
def _delta_kernel(
    dout_ptr, out_ptr, num_queries, delta_ptr, K: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta = sum of dout·out over a head's lanes: what softmax's backward subtracts."""
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    stride = num_heads * K
    do = load_rows((dout_ptr, None, stride), image, first, num_queries, head, K, BLOCK_M, True)
    o = load_rows((out_ptr, None, stride), image, first, num_queries, head, K, BLOCK_M, True)
    delta = tl.sum(do[0].to(tl.float32) * o[0].to(tl.float32), 1)
    delta += tl.sum(do[1].to(tl.float32) * o[1].to(tl.float32), 1)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + (image * num_heads + head) * num_queries + rows, delta, rows < num_queries)


@triton.jit
def _backward_queries(
    sums, k, v, seen, queries, douts, stats, image, first, count, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a block of keys and values.

    `queries` and `douts` are (source, head); `stats` points at this head's log-sum-exps and deltas;
    `seen` says which keys are, or is None.
    """
    q = load_rows(queries[0], image, first, count, queries[1], K, BLOCK, LAST)
    rows = first + tl.arange(0, BLOCK)
    if LAST:  # exp2(-inf) makes nothing of rows past the image, whatever a descriptor read there
        lse = tl.load(stats[0] + rows, mask=rows < count, other=float("inf"))
        delta = tl.load(stats[1] + rows, mask=rows < count, other=0.0)
    else:
        lse = tl.load(stats[0] + rows)
        delta = tl.load(stats[1] + rows)
    scores = product(k, q)  # transposed: [keys, queries]
    p = tl.exp2(scores * scale - (lse * 1.4426950408889634)[None, :])
    if seen is not None:
        p = tl.where(seen[:, None], p, 0.0)
    do = load_rows(douts[0], image, first, count, douts[1], K, BLOCK, LAST)
    dv = add_weighted(p.to(do[0].dtype), do, sums[1])
    ds = p * (product(v, do) - delta[None, :])
    dk = add_weighted(ds.to(q[0].dtype), q, sums[0])
    return dk, dv


# A number of queries that is a multiple of 16 makes statistics load 16 bytes at a time.
@triton.jit(do_not_specialize=["num_keys"])
def _attention_backward_kv_kernel(
    dout_src, dout_rest, q_src, q_rest, kv_src, kv_rest, mask_ptr, stats, layout,
    num_queries, num_keys,
    gradients,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values from all queries, or, masked, from SPLIT of them.

    `stats` are pointers to log-sum-exps and deltas, `gradients` those to dk and dv; `layout` is the
    forward's and then the stride of the gradients' tokens. The weights of keys past the image may
    be anything: they reach only their own rows, which are not stored.
    """
    q_head, k_head, v_head, q_stride, kv_stride, out_stride = layout
    scale = 1.4426950408889634 / K**0.5  # with log2(e), for exp2
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(num_keys, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    source = (kv_src, kv_rest, kv_stride)
    k = load_rows(source, image, first, num_keys, k_head + head, K, BLOCK_N, True)
    v = load_rows(source, image, first, num_keys, v_head + head, K, BLOCK_N, True)
    of_head = (image * num_heads + head) * num_queries
    stats = (stats[0] + of_head, stats[1] + of_head)
    queries = ((q_src, q_rest, q_stride), q_head + head)
    douts = ((dout_src, dout_rest, num_heads * K), head)
    sums = (zero_tile(BLOCK_N), zero_tile(BLOCK_N))
    if mask_ptr is not None:
        rows = first + tl.arange(0, BLOCK_N)
        seen = tl.load(mask_ptr + image * num_keys + rows, mask=rows < num_keys, other=0) != 0
        split = tl.program_id(0) // tiles
        for at in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, num_queries), BLOCK_M):
            sums = _backward_queries(
                sums, k, v, seen, queries, douts, stats, image, at, num_queries, scale,
                K, BLOCK_M, True,
            )  # fmt: skip
        image += split * tl.num_programs(2)  # the sums of a split lie behind those of another
    else:
        last = (num_queries - 1) // BLOCK_M * BLOCK_M
        for at in range(0, last, BLOCK_M):
            sums = _backward_queries(
                sums, k, v, None, queries, douts, stats, image, at, num_queries, scale,
                K, BLOCK_M, False,
            )  # fmt: skip
        if q_rest is not None:  # a loop of one round: see attention_tiles.py
            for at in tl.range(last, num_queries, BLOCK_M, num_stages=1):
                sums = _backward_queries(
                    sums, k, v, None, queries, douts, stats, image, at, num_queries, scale,
                    K, BLOCK_M, True,
                )  # fmt: skip
        else:
            sums = _backward_queries(
                sums, k, v, None, queries, douts, stats, image, last, num_queries, scale,
                K, BLOCK_M, True,
            )  # fmt: skip
    natural = scale * 0.6931471805599453
    dk, dv = sums
    dk = (dk[0] * natural, dk[1] * natural)
    store_rows(gradients[0], dk, image, first, num_keys, out_stride, head, K, BLOCK_N)
    store_rows(gradients[1], dv, image, first, num_keys, out_stride, head, K, BLOCK_N)


@triton.jit
def _backward_keys(
    dq, q, do, lse, delta, keys, mask_ptr, image, first, count, scale,
    K: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a block of queries.

    Keys that are not seen are left out after the last product before the sum: a select between the
    products would make the assembler run them one by one. Until then their weights may be infinite.
    """
    k = load_rows(keys[0], image, first, count, keys[1], K, BLOCK, LAST)
    scores = product(q, k)
    if LAST or mask_ptr is not None:
        rows = first + tl.arange(0, BLOCK)
        seen = rows < count
        if mask_ptr is not None:
            seen = tl.load(mask_ptr + image * count + rows, mask=seen, other=0) != 0
        scores = tl.where(seen[None, :], scores, float("-inf"))
    p = tl.exp2(scores * scale - lse[:, None])
    v = load_rows(keys[0], image, first, count, keys[2], K, BLOCK, LAST)
    ds = p * (product(do, v) - delta[:, None])
    return add_weighted(ds.to(k[0].dtype), k, dq)


@triton.jit(do_not_specialize=["num_keys"])
def _attention_backward_q_kernel(
    dout_src, dout_rest, q_src, q_rest, kv_src, kv_rest, mask_ptr, stats, layout,
    num_queries, num_keys,
    dq_ptr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries from all keys."""
    q_head, k_head, v_head, q_stride, kv_stride, out_stride = layout
    scale = 1.4426950408889634 / K**0.5  # with log2(e), for exp2
    image = tl.program_id(2).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    q = load_rows(
        (q_src, q_rest, q_stride), image, first, num_queries, q_head + head, K, BLOCK_M, True
    )
    do = load_rows(
        (dout_src, dout_rest, num_heads * K), image, first, num_queries, head, K, BLOCK_M, True
    )
    rows = first + tl.arange(0, BLOCK_M)
    at_rows = (image * num_heads + head) * num_queries + rows
    # Rows past the image are not stored; +inf keeps their weights 0 rather than infinite.
    lse = tl.load(stats[0] + at_rows, mask=rows < num_queries, other=float("inf"))
    lse *= 1.4426950408889634
    delta = tl.load(stats[1] + at_rows, mask=rows < num_queries, other=0.0)
    keys = ((kv_src, kv_rest, kv_stride), k_head + head, v_head + head)
    dq = zero_tile(BLOCK_M)
    last = (num_keys - 1) // BLOCK_N * BLOCK_N
    for at in range(0, last, BLOCK_N):
        dq = _backward_keys(
            dq, q, do, lse, delta, keys, mask_ptr, image, at, num_keys, scale, K, BLOCK_N, False
        )
    if kv_rest is not None:
        for at in tl.range(last, num_keys, BLOCK_N, num_stages=1):
            dq = _backward_keys(
                dq, q, do, lse, delta, keys, mask_ptr, image, at, num_keys, scale, K, BLOCK_N, True
            )
    else:
        dq = _backward_keys(
            dq, q, do, lse, delta, keys, mask_ptr, image, last, num_keys, scale, K, BLOCK_N, True
        )
    natural = scale * 0.6931471805599453
    dq = (dq[0] * natural, dq[1] * natural)
    store_rows(dq_ptr, dq, image, first, num_queries, out_stride, head, K, BLOCK_M)


def backward(
    op: str,
    dout: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    heads: tuple[int, int, int],
    gradients: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    tuned: Config | None,
) -> None:
    """Write the gradients of heads in buffers to dq, dk and dv [B, tokens, H, K].

    `saved` are the buffers of q and of kv as attention.attend takes them, its out and its
    log-sum-exp. With a mask dk and dv gain a first dimension, the number of `splits`, and are
    float32: sums over parts of the queries, which the caller adds up.
    """
    q, kv, out, lse = saved
    dq, dk, dv = gradients
    (B, H, N), T, K = lse.shape, kv.shape[1], q.shape[-1]
    dout = dout.contiguous()
    delta = torch.empty_like(lse)
    launch(_delta_kernel, (ceil_div(N, DELTA["BLOCK_M"]), H, B), dout, out, N, delta, K=K, **DELTA)
    dout = dout.view(B, N, H, K)
    for name, table in ((f"{op}_backward_kv", BACKWARD_KV), (f"{op}_backward_q", BACKWARD_Q)):
        chosen, on = configuration(name, (B * H, N), table, tuned, (q, kv, dout))
        block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
        inputs = (
            *sources(dout, block_m, on), *sources(q, block_m, on), *sources(kv, block_n, on),
            key_mask, (lse, delta),
        )  # fmt: skip
        layout = (*heads, q.stride(1), kv.stride(1))
        if table is BACKWARD_KV:
            programs = ceil_div(T, block_n) * (1 if key_mask is None else splits(N))
            launch(
                _attention_backward_kv_kernel, (programs, H, B),
                *inputs, (*layout, dk.stride(-3)), N, T, (dk, dv), K=K, SPLIT=SPLIT, **chosen,
            )  # fmt: skip
        else:
            launch(
                _attention_backward_q_kernel, (ceil_div(N, block_m), H, B),
                *inputs, (*layout, dq.stride(1)), N, T, dq, K=K, **chosen,
            )  # fmt: skip


def splits(num_queries: int) -> int:
    """How many parts the masked dK/dV pass divides the queries into."""
    return ceil_div(num_queries, SPLIT)


def attention_backward_triton(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, tuned: Config | None = None
) -> Tensor:
    """dqkv [B, N, 3, H, K], packed as qkv is."""
    H, buffer, dqkv = qkv.shape[3], qkv.flatten(2, 3), torch.empty_like(qkv)
    dq, dk, dv = dqkv.unbind(2)
    backward(
        "attention", dout, (buffer, buffer, out, lse), (0, H, 2 * H), (dq, dk, dv), None, tuned
    )
    return dqkv
