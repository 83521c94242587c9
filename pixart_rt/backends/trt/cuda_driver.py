"""The few calls of the CUDA driver that launch a compiled kernel, through ctypes.

Works in whatever context the caller has made current; TensorRT makes its own before it calls a
plugin. Nothing here waits for the GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

from pixart_rt.backends.trt.plugin_kernels import KernelImage
from pixart_rt.errors import BackendError

LIBRARY = "libcuda.so.1"
WARP = 32
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


class Driver:
    """The CUDA driver of this process. `library` replaces it in tests."""

    def __init__(self, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise BackendError(
                f"{LIBRARY} cannot be loaded ({error}); an engine with plugins needs the NVIDIA "
                "driver"
            ) from error
        self._functions: dict[tuple[int, bytes], ctypes.c_void_p] = {}
        self._capabilities: dict[int, str] = {}

    def function(self, images: Sequence[KernelImage]) -> tuple[KernelImage, ctypes.c_void_p]:
        """The image for the current context's GPU and its kernel, loaded once per GPU."""
        device = self._device()
        target = self._capability(device)
        image = next((each for each in images if each.target == target), None)
        if image is None:
            found = ", ".join(each.target for each in images)
            raise BackendError(
                f"this engine holds kernels for {found}, this GPU is {target}; build it again with "
                f"--target {target}"
            )
        key = (device, hashlib.sha256(image.binary).digest())
        if key not in self._functions:
            self._functions[key] = self._load(image)
        return image, self._functions[key]

    def launch(
        self,
        function: ctypes.c_void_p,
        image: KernelImage,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        stream: int,
    ) -> None:
        """Queue one launch on a stream. The driver copies the arguments before it returns."""
        addresses = [ctypes.cast(ctypes.pointer(each), ctypes.c_void_p) for each in arguments]
        self._call(
            "cuLaunchKernel",
            function,
            *map(ctypes.c_uint, (*grid, WARP * image.num_warps, 1, 1, image.shared_bytes)),
            ctypes.c_void_p(stream),
            (ctypes.c_void_p * len(addresses))(*addresses),
            None,
        )

    def _load(self, image: KernelImage) -> ctypes.c_void_p:
        """The kernel of an image, which stays loaded as long as the process."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image.binary))
        name = ctypes.c_char_p(image.name.encode())
        self._call("cuModuleGetFunction", ctypes.byref(function), module, name)
        self._call(  # without it a launch gets 48 KB at most
            "cuFuncSetAttribute",
            function,
            ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES),
            ctypes.c_int(image.shared_bytes),
        )
        return function

    def _device(self) -> int:
        device = ctypes.c_int()
        self._call("cuCtxGetDevice", ctypes.byref(device))
        return device.value

    def _capability(self, device: int) -> str:
        if device not in self._capabilities:
            number = []
            for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
                value = ctypes.c_int()
                self._call(
                    "cuDeviceGetAttribute",
                    ctypes.byref(value),
                    ctypes.c_int(attribute),
                    ctypes.c_int(device),
                )
                number.append(value.value)
            self._capabilities[device] = f"sm{number[0]}{number[1]}"
        return self._capabilities[device]

    def _call(self, name: str, *arguments: Any) -> None:
        """Call the driver; a BackendError with its own words for any result but success."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise BackendError(
                f"a plugin's kernel was not run: {name} says {reason!r} (error {code}); build the "
                "bundle without --plugins"
            )
