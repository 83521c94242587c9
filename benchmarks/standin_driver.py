"""Triton's own launch path for a GPU that is not there: binder, compiler, launcher, descriptors.

    with standing_in((9, 0)) as driver:
        ln_modulate(x, table, shared, 0)  # x is a tensor of the CPU; its kernel is launched
    driver.kernels, driver.launches

Triton's CUDA driver is loaded against a libcuda.so.1 made here, of some thirty lines of C: it
refuses what NVIDIA's documentation says that a GPU refuses (tensor maps, grids, shared memory) and
runs nothing. Everything above it is what runs on a card: how arguments specialize a kernel, its
compilation to a cubin, the C launcher. Results are whatever the memory held.

Only for a process of its own that nothing else of CUDA is used in: the library stays loaded, and
TRITON_INTERPRET must be 0 before Triton is imported. Needs a C compiler, as Triton does on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

# An H100's, by CUDA C Programming Guide, table of compute capabilities.
SHARED_OPTIN, SHARED_SM, REGISTERS, PROCESSORS = 232448, 233472, 65536, 132

LIBCUDA = r"""
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
static char reason[512] = "stand-in";
static int current = 1;
long launched = 0, described = 0;
#define REFUSE(...) do { snprintf(reason, sizeof reason, __VA_ARGS__); \
                         return CUDA_ERROR_INVALID_VALUE; } while (0)
CUresult cuGetErrorString(CUresult e, const char **s) { (void)e; *s = reason; return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&current; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { (void)c; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  (void)d; *c = (CUcontext)&current; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { (void)l; *v = 1 << 20; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { (void)l; (void)v; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *d) { *m = (CUmodule)d; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
  (void)n; *f = (CUfunction)m; return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { (void)f; (void)c; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  (void)f;
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v > SHARED_OPTIN)
    REFUSE("%d bytes of shared memory", v);
  return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  (void)f; *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  (void)d;
  switch (a) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = SHARED_OPTIN; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = SHARED_SM; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = PROCESSORS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
    default: *v = 1;
  }
  return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
  (void)a; *(CUdeviceptr *)v = p; return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  (void)f; (void)c; *n = 1; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
  (void)p; (void)x;
  if (!f) REFUSE("no function");
  if (c->gridDimX > 2147483647u || c->gridDimY > 65535 || c->gridDimZ > 65535)
    REFUSE("grid %u x %u x %u", c->gridDimX, c->gridDimY, c->gridDimZ);
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ) REFUSE("empty grid");
  if (c->blockDimX * c->blockDimY * c->blockDimZ > 1024) REFUSE("%u threads", c->blockDimX);
  if (c->sharedMemBytes > SHARED_OPTIN) REFUSE("%u bytes of shared memory", c->sharedMemBytes);
  launched++;
  return 0; }
/* The preconditions of cuTensorMapEncodeTiled in the CUDA Driver API, without interleaving. */
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *m, CUtensorMapDataType type, cuuint32_t rank, void *base, const cuuint64_t *dim,
    const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *step,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
    CUtensorMapFloatOOBfill fill) {
  static const int sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const cuuint64_t spans[] = {0, 32, 64, 128};
  (void)m; (void)l2; (void)fill;
  if ((unsigned)type > 12) REFUSE("type %d", type);
  cuuint64_t size = sizes[type], least = dim[0] * size;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) REFUSE("interleave %d", interleave);
  if (rank < 1 || rank > 5) REFUSE("rank %u", rank);
  if ((uintptr_t)base % 16) REFUSE("address %p is not a multiple of 16", base);
  for (cuuint32_t i = 0; i < rank; i++) {
    if (dim[i] < 1 || dim[i] > (1ull << 32)) REFUSE("size %llu", (unsigned long long)dim[i]);
    if (box[i] < 1 || box[i] > 256) REFUSE("box of %u", box[i]);
    if (step[i] < 1 || step[i] > 8) REFUSE("element stride %u", step[i]);
  }
  for (cuuint32_t i = 0; i + 1 < rank; i++) {
    if (stride[i] % 16 || stride[i] >= (1ull << 40) || stride[i] < least)
      REFUSE("stride %llu of dimension %u", (unsigned long long)stride[i], i + 1);
    if (i && stride[i] % stride[i - 1]) REFUSE("stride %u is no multiple of the one inside", i + 1);
    least = dim[i + 1] * stride[i];
  }
  if (box[0] * size % 16) REFUSE("an inner box of %llu bytes", (unsigned long long)(box[0] * size));
  if ((unsigned)swizzle < 4 && swizzle && box[0] * size > spans[swizzle])
    REFUSE("an inner box of %llu bytes is wider than its swizzle",
           (unsigned long long)(box[0] * size));
  described++;
  return 0; }
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that was compiled and loaded: one variant for each way its arguments specialize."""

    name: str
    cubin: bytes
    shared_bytes: int
    global_scratch: int


class StandInDriver(CudaDriver):  # type: ignore[misc]  # triton is not annotated
    """Triton's CUDA driver on a GPU of compute capability `arch` that runs nothing."""

    def __init__(self, arch: tuple[int, int]) -> None:
        self.arch = arch
        self.kernels: list[Kernel] = []
        self._libcuda = _libcuda()
        self.utils = CudaUtils()
        self.launcher_cls = self._launcher
        self._load = self.utils.load_binary
        self._scratch = 0
        # What Triton's own constructor takes from torch.cuda.
        self.get_current_device = lambda: 0
        self.set_current_device = lambda _: None
        self.get_current_stream = lambda *_: 0
        self.get_device_capability = lambda *_: arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.arch[0] + self.arch[1], 32)

    def _launcher(self, source: Any, metadata: Any) -> Any:
        self._scratch = metadata.global_scratch_size  # the cubin is loaded next
        return CudaLauncher(source, metadata)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> Any:
        self.kernels.append(Kernel(name, cubin, shared, self._scratch))
        return self._load(name, cubin, shared, device)

    @property
    def launches(self) -> int:
        """How many launches reached the driver."""
        return ctypes.c_long.in_dll(self._libcuda, "launched").value

    @property
    def descriptors(self) -> int:
        """How many tensor descriptors were made."""
        return ctypes.c_long.in_dll(self._libcuda, "described").value

    def variants(self) -> Counter[str]:
        """How many variants of each kernel were compiled."""
        return Counter(kernel.name for kernel in self.kernels)


def _libcuda() -> ctypes.CDLL:
    """Build the library and load it under NVIDIA's name, so that Triton's modules find it."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the stand-in driver needs a C compiler: install gcc, or set CC")
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    limits = {
        "SHARED_OPTIN": SHARED_OPTIN, "SHARED_SM": SHARED_SM,
        "REGISTERS": REGISTERS, "PROCESSORS": PROCESSORS,
    }  # fmt: skip
    source.write_text(LIBCUDA, encoding="utf-8")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}",
         *(f"-D{name}={value}" for name, value in limits.items()), source, "-o", library],
        check=True,
    )  # fmt: skip
    triton.knobs.nvidia.libcuda_path = str(folder)  # where the linker looks
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def standing_in(arch: tuple[int, int] = (9, 0)) -> Iterator[StandInDriver]:
    """Launch on a GPU of compute capability `arch` that runs nothing, from tensors of the CPU.

    Inside, every tensor says that it is a GPU's (`is_cuda`), and torch.cuda that there is one.
    """
    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0 before triton is imported"
    driver = StandInDriver(arch)
    here = nullcontext()
    cuda = mock.patch.multiple(
        torch.cuda,
        get_device_capability=lambda *_: arch,
        get_device_name=lambda *_: "stand-in",
        current_device=lambda: 0,
        set_device=lambda *_: None,
        device=lambda *_: here,
        device_of=lambda *_: here,
    )
    with (
        cuda,
        mock.patch.object(driver.utils, "load_binary", driver.load_binary),
        mock.patch.object(Tensor, "is_cuda", True, create=True),
    ):
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver._active = None


PRODUCTS = {  # of matrices: hours on a CPU at XL's shapes
    torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm,
    torch.ops.aten._addmm_activation, torch.ops.aten._scaled_mm,
}  # fmt: skip
IN_PLACE = {torch.ops.aten.addmm_, torch.ops.aten.baddbmm_}


class NoProducts(TorchDispatchMode):
    """Matrix products give memory of their shape; all other operators run, ours inside too.

    `seen` counts them by overload packet, those inside our operators as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen[func.overloadpacket] += 1
        if func.overloadpacket in IN_PLACE:
            return args[0]
        if func.overloadpacket in PRODUCTS:
            shapes = [
                tree_map_only(Tensor, lambda t: t.to("meta"), part) for part in (args, kwargs)
            ]
            made = func(*shapes[0], **shapes[1])
            return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype)
        if func.namespace == "pixart_rt":  # a mode is off inside an operator that it was given
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        return func(*args, **kwargs)


def resources(kernel: Kernel) -> dict[str, int]:
    """Registers, and bytes of stack and local memory (spills), of a cubin: what loads on a GPU."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "local_bytes": found["STACK"] + found["LOCAL"]}
