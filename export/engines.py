"""ONNX or exported program -> engine: TensorRT, TensorRT-RTX, AOTInductor.

TensorRT builds run in a process of their own (trt_worker.py): whatever happens to it becomes one
BuildError, and its peak memory is its own. Engines are written aside and renamed.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_rt.backends.trt.backend import LIBRARIES, import_library, supported_targets
from pixart_rt.errors import BuildError, ConfigError
from pixart_rt.export.worker.protocol import REASON_LINES, ask, peak_memory

if TYPE_CHECKING:
    from torch.export import ExportedProgram

WORKER = "pixart_rt.export.worker.trt"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What a build cost and made."""

    seconds: float
    peak_bytes: int  # resident memory of the process that built it
    engine_bytes: int
    library_version: str
    log_tail: str = ""  # the last lines that the library wrote


def engine_targets(library: str) -> tuple[str, ...]:
    """The targets that a library builds for: any of these without that GPU (tensorrt-rtx), or the
    present GPU alone (tensorrt), which may be none.
    """
    _check_library(library)
    return supported_targets(library) or _present_target()


def check_targets(library: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets of a build, empty meaning the present GPU. A ConfigError before any work, when
    the library cannot build for one of them.
    """
    known = engine_targets(library)
    present = _present_target()
    if not targets and not present:
        raise ConfigError(
            f"{library} was requested for the present machine, which has no usable NVIDIA GPU; "
            + (f"choose --target among {', '.join(known)}" if known else "build on one that has")
        )
    wanted = tuple(dict.fromkeys(target.lower() for target in targets or present))
    if unknown := [target for target in wanted if target not in known]:
        version = import_library(library).__version__
        rule = "builds for the present GPU only" if library == "tensorrt" else "builds for"
        raise ConfigError(
            f"target {', '.join(unknown)} is not supported: {library} {version} {rule} "
            f"{', '.join(known) or '(none found)'}"
        )
    return wanted


def build_tensorrt(
    onnx: Path,
    engine: Path,
    *,
    library: str,
    profiles: list[dict[str, list[int]]],
    targets: tuple[str, ...] = (),
    kernels: Mapping[str, bytes] | None = None,
) -> EngineStats:
    """Build `engine` from `onnx` with "tensorrt-rtx" or "tensorrt".

    A profile maps the names of the graph's dynamic dimensions to [min, opt, max]. Several targets
    share one engine (tensorrt-rtx). `kernels` are those of the graph's plugin nodes, if it has any
    (backends/trt/plugins.py). Raises ConfigError before any work, BuildError after.
    """
    targets = check_targets(library, targets)
    check_profiles(profiles)
    if not onnx.is_file():
        raise BuildError(f"{onnx} does not exist; export the component first")
    partial = engine.with_name(f".{engine.name}.{os.getpid()}.part")
    request = {
        "module": LIBRARIES[library].module,
        "onnx": str(onnx),
        "engine": str(partial),
        "profiles": profiles,
        "targets": targets if library == "tensorrt-rtx" else (),
        "kernels": {
            name: base64.b64encode(packed).decode() for name, packed in (kernels or {}).items()
        },
    }
    start = time.perf_counter()
    try:
        with _library_path(library, plugins=bool(kernels)) as environment:
            answer, log = ask(WORKER, request, engine.name, environment=environment, advice=_advice)
        stats = EngineStats(
            seconds=time.perf_counter() - start,
            peak_bytes=answer["peak_bytes"],
            engine_bytes=partial.stat().st_size,
            library_version=f"{library} {answer['version']}",
            log_tail=log,
        )
        os.replace(partial, engine)
    finally:
        partial.unlink(missing_ok=True)
    return stats


@contextmanager
def _library_path(library: str, *, plugins: bool) -> Iterator[dict[str, str]]:
    """The environment in which `library` builds, with plugins or without.

    With plugins the parser of TensorRT-RTX opens libtensorrt_rtx.so by that name, which its wheel
    does not have (only ....so.1), and aborts. A link in a folder on the worker's path helps.
    """
    environment = dict(os.environ)
    found = importlib.util.find_spec("tensorrt_rtx_libs") if library == "tensorrt-rtx" else None
    if not plugins or found is None:
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        for place in found.submodule_search_locations or ():
            for path in sorted(Path(place).glob("libtensorrt_rtx.so.*"))[:1]:
                (Path(folder) / "libtensorrt_rtx.so").symlink_to(path.resolve())
        earlier = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, earlier)))
        yield environment


def check_profiles(profiles: list[dict[str, list[int]]]) -> None:
    """Every range is 0 <= min <= opt <= max, and not of nothing only."""
    if not profiles:
        raise ConfigError("an engine needs at least one profile of dimension ranges; got none")
    for profile in profiles:
        for name, values in profile.items():
            if len(values) != 3 or not 0 <= values[0] <= values[1] <= values[2] > 0:
                raise ConfigError(f"{name} has the range {values}; give [min, opt, max] in order")


def _advice(reason: str) -> str:
    """What to do about refusals that are known."""
    if re.search(r"FP32 GEMM is not supported|HW-specific datatypes", reason):
        return "; this target needs --precision fp16"
    return ""


def build_aoti(program: ExportedProgram, path: Path) -> EngineStats:
    """Compile an exported program into the AOTInductor package `path` (.pt2).

    `peak_bytes` is the peak of this whole process. Raises BuildError with the compiler's reason.
    """
    import torch

    if path.suffix != ".pt2":
        raise ConfigError(f"an AOTInductor package ends in .pt2, {path.name} was requested")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # The compiler warns of its own deprecated internals, and of nothing in the program.
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(program, package_path=str(partial))
        size = partial.stat().st_size
        os.replace(partial, path)
    except Exception as error:  # the compiler, its C++ compiler and the packager raise anything
        raise BuildError(f"{path.name} was not compiled: {_compiler_reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return EngineStats(
        seconds=time.perf_counter() - start,
        peak_bytes=peak_memory(),
        engine_bytes=size,
        library_version=f"torch {torch.__version__}",
    )


def _compiler_reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "InvalidCxxCompiler" in f"{type(error).__name__}{error}":
        return "no C++ compiler was found; install g++ (apt-get install g++) or set CXX"
    return " | ".join(lines[-REASON_LINES:]) or type(error).__name__


def _check_library(library: str) -> None:
    if library not in LIBRARIES:
        raise ConfigError(f"{library!r} is no engine library; choose from {', '.join(LIBRARIES)}")
    import_library(library)


def _present_target() -> tuple[str, ...]:
    """The GPU that is here, or nothing."""
    import torch

    from pixart_rt.backends.engine_files import capability

    return (capability(torch.device("cuda")),) if torch.cuda.is_available() else ()
