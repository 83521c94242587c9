"""Tiles of attention's kernels: heads of 72 lanes as 64 + 16, read by TMA or by pointers.

B images, H heads, K = 72 lanes a head. A tile is some tokens of one head of one image. The tensor
cores work on 80 lanes, where a power of two would be 128; the 8 spare lanes are read as zeros,
whatever memory holds there, and are not stored.

q, k and v lie in buffers [B, tokens, heads of the buffer, K], rows apart by any stride: packed qkv
is one buffer of 3·H heads, of which q, k and v have the first, second and last H. From compute
capability 9.0 on a buffer is read by TMA: lanes 0 to 63 through a descriptor of the matrix
[B·tokens, heads·K] in boxes [tokens, 64], the rest through one of [B·tokens, heads, K] in boxes
[tokens, 1, 16], where the hardware writes zeros past lane 71. Before, a tile comes by pointers,
with a mask.

sm_90 runs matrix instructions one by one where ptxas says C7515 (tests/kernels/test_codegen.py).
Hence no select on a tile between its load and a product, and the last block, which masks what is
past the image, in a loop of its own of one round: products that follow a loop directly are
serialized, and the loop's with them. The wide part is read without the third dimension, which would
take the tile through registers (134 a thread in the forward instead of 118).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.launch import SM80, SM90, capability, config, constant_result, runs_triton
from pixart_rt.kernels.triton_import import TensorDescriptor, tl, triton

HEAD = 72  # the only head width the kernels take; others run the reference
WIDE, NARROW = 64, 16  # lanes of the two parts of a tile
SM120 = (12, 0)

Config = dict[str, int]
# float32 products are exact here ("ieee"), without tensor cores: for tests. See `takes`.
FLOAT32: Config = {
    "BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1, "DESCRIPTORS": 0,
}  # fmt: skip


@triton.jit
def load_rows(
    source, image, first, count, head,
    K: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Tokens first..first+BLOCK-1 of a head of one image: lanes 0 to 63, and lanes 64 to 79.

    `source` is (wide descriptor, narrow descriptor, _) or (pointer, None, stride of tokens). Tokens
    past the image are zero by pointers, the next image's (or zero) by descriptors. Without EXACT
    all tokens must lie in the image.
    """
    if source[1] is not None:
        row = (image * count + first).to(tl.int32)
        wide = source[0].load([row, head * K])
        narrow = tl.reshape(source[1].load([row, head, 64]), [BLOCK, 16])
    else:
        # The 64-bit part of the offset is one number for the tile; what varies fits in 32 bits.
        start = source[0] + (image * count + first) * source[2] + head * K
        rows, lanes = tl.arange(0, BLOCK), tl.arange(0, 16)
        pointers = start + rows[:, None] * source[2]
        mine = (lanes < K - 64)[None, :]
        if EXACT:
            inside = (first + rows < count)[:, None]
            wide = tl.load(pointers + tl.arange(0, 64)[None, :], mask=inside, other=0.0)
            mine = mine & inside
        else:
            wide = tl.load(pointers + tl.arange(0, 64)[None, :])
        narrow = tl.load(pointers + 64 + lanes[None, :], mask=mine, other=0.0)
    return wide, narrow


@triton.jit
def store_rows(
    out_ptr, tile, image, first, count, stride, head, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The counterpart of load_rows: the head's own lanes, and tokens of this image only."""
    rows, lanes = tl.arange(0, BLOCK), tl.arange(0, 16)
    dtype = out_ptr.dtype.element_ty
    pointers = out_ptr + (image * count + first) * stride + head * K + rows[:, None] * stride
    inside = (first + rows < count)[:, None]
    tl.store(pointers + tl.arange(0, 64)[None, :], tile[0].to(dtype), mask=inside)
    mine = inside & (lanes[None, :] < K - 64)
    tl.store(pointers + 64 + lanes[None, :], tile[1].to(dtype), mask=mine)


@triton.jit
def product(a, b):
    """a·bᵀ over 64 + 16 lanes, float32. "ieee" concerns float32 operands: no tf32."""
    wide = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    return tl.dot(a[1], tl.trans(b[1]), wide, input_precision="ieee")


@triton.jit
def add_weighted(p, tile, sums):
    """sums + p·tile, both parts; p is rounded to the tile's dtype by the caller."""
    wide = tl.dot(p, tile[0], sums[0], input_precision="ieee")
    narrow = tl.dot(p, tile[1], sums[1], input_precision="ieee")
    return wide, narrow


@triton.jit
def zero_tile(BLOCK: tl.constexpr):
    """Both parts of a tile in float32, of zeros."""
    return tl.zeros([BLOCK, 64], tl.float32), tl.zeros([BLOCK, 16], tl.float32)


def newest(table: Mapping[tuple[int, int], Config], like: Tensor) -> Config:
    """The entry of the latest compute capability that the GPU of `like` has reached."""
    return table[max(least for least in table if least <= max(capability(like), SM80))]


def configuration(
    op: str,
    shape: tuple[int, int],
    table: Mapping[tuple[int, int], Config],
    tuned: Config | None,
    buffers: tuple[Tensor, ...],
) -> tuple[Config, int]:
    """What `op` is launched with at (B·H, N), and whether its tiles come by descriptors.

    `tuned` replaces entries. Descriptors need the hardware, and addresses and rows of 16 bytes'
    alignment.
    """
    like = buffers[0]
    default = FLOAT32 if like.dtype == torch.float32 else newest(table, like)
    chosen = {**config(op, like, shape, default), **(tuned or {})}
    descriptors = chosen.pop("DESCRIPTORS")
    if descriptors and not (capability(like) >= SM90 and all(map(_describable, buffers))):
        descriptors = 0
    return chosen, descriptors


def _describable(buffer: Tensor) -> bool:
    return buffer.data_ptr() % 16 == 0 and buffer.stride(1) * buffer.element_size() % 16 == 0


def sources(buffer: Tensor, block: int, descriptors: int) -> tuple[Any, Any]:
    """How a kernel reads a buffer [B, tokens, heads, K]: a pointer, or blocks of 64 and 16 lanes.

    Arguments of their own: Triton launches no descriptors in tuples. Nor are numbers of tokens in
    one: there Triton compiles anew for a multiple of 16, whatever do_not_specialize says.
    """
    if not descriptors:
        return buffer, None
    B, tokens, heads, K = buffer.shape
    shape, strides = [B * tokens, heads, K], [buffer.stride(1), K, 1]
    wide = TensorDescriptor(buffer, [B * tokens, heads * K], [buffer.stride(1), 1], [block, WIDE])
    return wide, TensorDescriptor(buffer, shape, strides, [block, 1, NARROW])


def takes(op: str, x: Tensor) -> bool:
    """Whether the kernels run on x [..., K]: its device, head width and dtype."""
    known = x.dtype in (torch.float16, torch.bfloat16)
    # On a GPU float32 is PyTorch's: on sm_80 the forward spills 770 bytes or more at every tile
    # tried without tensor cores, and 150 or more by three tf32 products. The interpreter takes it.
    known |= x.dtype == torch.float32 and not x.is_cuda
    return x.shape[-1] == HEAD and known and runs_triton(op, x, SM80)


def takes_traced(op: str, x: Tensor) -> bool:
    """`takes` while a graph is traced, of a tensor that does not exist.

    Not asked again when the graph runs: the operator then has its own way to do without a kernel.
    """
    return x.shape[-1] == HEAD and _takes_head(op, x.device, x.dtype)


@constant_result
def _takes_head(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    return takes(op, torch.empty(HEAD, device=device, dtype=dtype))
