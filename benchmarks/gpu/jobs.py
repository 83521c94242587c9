"""What each call runs, in which order: what matters most first, what compiles side by side.

`check` asks whether it is right, then times what compiles nothing. `measure` starts with what
compiles longest, and times in between; one process times at a time (pixart_rt/bench/gpu_lock.py),
and neither compiling nor comparing holds the others up. A job has a limit of its own. With `small`
every job that can runs on tiny shapes, without a GPU, so that the script itself is tried.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.pool import Job, Stage

CALLS = ("check", "measure")
EXTRA = ("sanitizer", "profile", "image-compiled")  # parts of `measure`, when asked
SECONDS = {"check": 230, "measure": 520}  # of a call, all in all
SLOTS = 6  # of 16 cores: a compilation is one busy thread and a few workers
SMALL_SLOTS, SMALL_LIMIT = 2, 3600
RESOLUTIONS = (1024, 256, 512)
DTYPES = ("bfloat16", "float16", "float32")
EAGER = "diffusers,ours fused,ours fused in one graph"
THEIRS, FP8 = "diffusers compiled", "ours fused fp8 in one graph"
TRAINED = "diffusers compiled blocks,ours compiled fused"
FIRST_TESTS = 60  # seconds that the first tests may take
NO_GPU = "it needs a GPU"
# pytest-benchmark warns where tests run side by side, and the project's warnings are errors.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark")
INTERPRETED = (("TRITON_INTERPRET", "1"),)
FEW_WORKERS = (("TORCHINDUCTOR_COMPILE_THREADS", "4"),)


def stages(call: str, work: Path, small: bool, parts: Sequence[str] = ()) -> list[Stage]:
    """The jobs of a call, or of some of its parts with what those need."""
    made = check(work, small) if call == "check" else measure(work, small)
    jobs = {job.name: job for stage in made for job in stage.jobs}
    wanted = {name for name, job in jobs.items()
              if job.part in parts or (not parts and job.part not in EXTRA)}  # fmt: skip
    for name in reversed(jobs):  # a job stands after those it needs
        if name in wanted:
            wanted |= set(jobs[name].needs)
    if small:  # the machine may have two cores, and busy ones
        jobs = {name: replace(job, limit=SMALL_LIMIT) for name, job in jobs.items()}
    return [
        replace(stage, jobs=tuple(jobs[job.name] for job in stage.jobs if job.name in wanted))
        for stage in made
    ]


def parts_of(call: str) -> tuple[str, ...]:
    """In order; those of EXTRA too."""
    every = check(Path(), True) if call == "check" else measure(Path(), True)
    return tuple(dict.fromkeys(job.part for stage in every for job in stage.jobs))


def bench(work: Path, part: str, name: str, module: str, *words: object, limit: float,
          group: str = "", cannot: str = "", environment: tuple[tuple[str, str], ...] = (),
          ) -> Job:  # fmt: skip
    """A benchmark of this folder, which writes JSON as it goes."""
    output = work / "parts" / f"{name}.json"
    command = (sys.executable, "-u", "-m", module, *map(str, words), "--json", str(output))
    return Job(name=name, part=part, command=command, output=output, limit=limit, group=group,
               cannot=cannot, environment=environment)  # fmt: skip


def tests(name: str, *words: str, limit: float, small: bool) -> Job:
    """Some of the project's tests, on poisoned memory and, with a GPU, those that run on it."""
    marked = () if small else ("-m", "gpu")
    return Job(name=name, part="tests", command=(*PYTEST, *marked, *words), limit=limit)


def check(work: Path, small: bool) -> list[Stage]:
    """Right first, in processes side by side; then times, one by one; then all other tests."""
    res, interpreted = (("--res", 64), INTERPRETED) if small else (("--res", 256, 1024), ())
    dtypes = ("float16",) if small else DTYPES
    right = [
        *(
            bench(work, "right", f"operators-{name}", "benchmarks.checks", "operators", "--dtypes",
                  name, limit=90, environment=interpreted)
            for name in dtypes
        ),
        bench(work, "right", "model", "benchmarks.checks", "model", *res,
              limit=90, environment=interpreted),
    ]  # fmt: skip
    return [
        Stage(jobs=(*right, *first_tests(small)), slots=SMALL_SLOTS if small else SLOTS),
        Stage(jobs=tuple(timed_first(work, small))),
        Stage(jobs=tuple(other_tests(small)), slots=SMALL_SLOTS if small else SLOTS),
    ]


def first_tests(small: bool) -> list[Job]:
    if small:  # what a GPU would run is found, and one file runs in the interpreter
        return [
            Job(name="tests-found", part="tests",
                command=(*PYTEST, "--collect-only", "-m", "gpu", "tests")),
            tests("tests-first", "tests/kernels/test_solver.py", limit=FIRST_TESTS, small=small),
        ]  # fmt: skip
    return [tests("tests-first", "tests/kernels/test_catalog.py", limit=FIRST_TESTS, small=small)]


def timed_first(work: Path, small: bool) -> list[Job]:
    """The card's ceilings, and steps of what compiles nothing but our kernels."""
    limits = ("--only", "ceilings")
    if small:
        return [
            bench(work, "limits", "ceilings", "benchmarks.limits", *limits, limit=100),
            bench(work, "steps", "steps-eager", "benchmarks.model", "--res", 64, "--forms", EAGER,
                  limit=200),
            loop(work, 256, "--model", "tiny", "--steps", 1),
        ]  # fmt: skip
    return [
        bench(work, "limits", "ceilings", "benchmarks.limits", *limits, limit=30),
        bench(work, "steps", "steps-eager", "benchmarks.model", "--res", *RESOLUTIONS, "--forms",
              EAGER, "--minutes", 1.2, limit=90),
        loop(work, 1024, limit=60),
    ]  # fmt: skip


def other_tests(small: bool) -> list[Job]:
    """As many as time allows."""
    if small:
        return []
    kernels = ("attention", "linear", "cross_attention", "gate_residual", "ln_modulate",
               "fp8_linear", "group_norm_silu", "solver")  # fmt: skip
    return [
        tests("tests-graphs", "tests/test_gpu.py", "-k", "captured and not aoti", limit=100,
              small=small),
        *(tests(f"tests-{name}", f"tests/kernels/test_{name}.py", limit=120, small=small)
          for name in kernels),
        tests("tests-training", "tests/training", limit=100, small=small),
    ]  # fmt: skip


def measure(work: Path, small: bool) -> list[Stage]:
    """In the order in which a kill may come."""
    return [
        Stage(
            jobs=(*compiled(work, small), *main_numbers(work, small), *rest(work, small)),
            slots=SMALL_SLOTS if small else SLOTS,
        ),
        Stage(jobs=tuple(extra(work))),
    ]


def compiled(work: Path, small: bool) -> list[Job]:
    """diffusers with max-autotune: minutes of compiling, a process for each size."""
    return [
        bench(work, "steps", f"steps-compiled-{pixels}", "benchmarks.model", "--res", pixels,
              "--forms", THEIRS, limit=400, environment=FEW_WORKERS)
        for pixels in ((64,) if small else RESOLUTIONS)
    ]  # fmt: skip


def main_numbers(work: Path, small: bool) -> list[Job]:
    """What the bars ask for, and the tables for this card."""
    if small:
        return [
            loop(work, 256, "--model", "tiny", "--steps", 1),
            bench(work, "kernels", "kernels", "benchmarks.kernels", limit=300),
            bench(work, "tune", "tune", "benchmarks.tune", limit=300, cannot=NO_GPU),
            training(work, 64, "diffusers,ours,ours fused,ours compiled", "--model", "tiny",
                     "--steps", 1, "--precision", "bf16"),
            image_folder(work, small),
            *images(work, small),
        ]  # fmt: skip
    return [
        loop(work, 1024),
        bench(work, "kernels", "kernels", "benchmarks.kernels", "--minutes", 2, limit=180),
        loop(work, 256),
        loop(work, 512),
        image_folder(work, small),
        bench(work, "tune", "tune", "benchmarks.tune", "--minutes", 2.5, limit=200),
        training(work, 256, TRAINED, "--steps", 3),
        training(work, 512, TRAINED, "--steps", 3),
        *images(work, small),
    ]  # fmt: skip


def rest(work: Path, small: bool) -> list[Job]:
    """fp8, and the card's own limits in full."""
    if small:
        return [
            bench(work, "fp8", "steps-fp8", "benchmarks.model", "--res", 64, "--forms", FP8,
                  limit=100),
            loop(work, 256, "--qualities", "fast", "--model", "tiny", "--steps", 1),
            bench(work, "limits", "limits", "benchmarks.limits", limit=200),
        ]  # fmt: skip
    return [
        bench(work, "fp8", "steps-fp8", "benchmarks.model", "--res", *RESOLUTIONS, "--forms", FP8,
              limit=100),
        loop(work, 1024, "--qualities", "fast"),
        bench(work, "limits", "limits", "benchmarks.limits", "--minutes", 0.7, limit=80),
        training(work, 1024, TRAINED, "--steps", 3),
    ]  # fmt: skip


def loop(work: Path, pixels: int, *words: object, limit: float = 150) -> Job:
    name = f"loop-{pixels}" + ("-fp8" if "fast" in words else "")
    return bench(work, "fp8" if "fast" in words else "loop", name, "benchmarks.loop", "--res",
                 pixels, "--prompts", 30, *words, limit=limit)  # fmt: skip


def training(work: Path, pixels: int, forms: str, *words: object) -> Job:
    """One at a time: each fills most of the memory."""
    return bench(work, "training", f"training-{pixels}", "benchmarks.train_step", "--res", pixels,
                 "--forms", forms, *words, limit=260, group="training",
                 environment=FEW_WORKERS)  # fmt: skip


def image_folder(work: Path, small: bool) -> Job:
    """The pipeline of XL size with random weights, T5-XXL's too."""
    words = ("--small",) if small else ()
    return Job(name="image-folder", part="image", limit=150, command=(
        sys.executable, "-m", "benchmarks.xl_folder", str(work / "weights" / "xl"), *words
    ))  # fmt: skip


def images(work: Path, small: bool) -> list[Job]:
    """Its bundle, compared with diffusers."""
    weights = work / "weights"
    return [
        Job(name="image-build", part="image", needs=("image-folder",), limit=200,
            command=cli("build", "--model", weights / "xl", "--res", 1024, "--backend", "torch",
                        "--out", weights / "xl-bundle")),
        image(work, "image", "xl-bundle", small, "--peer", "diffusers", needs="image-build"),
    ]  # fmt: skip


def image(
    work: Path, name: str, bundle: str, small: bool, *words: str, needs: str, part: str = "image"
) -> Job:
    """From a prompt to an image, by stages."""
    less = ("--steps", 2, "--repeats", 1) if small else ("--steps", 20, "--repeats", 5)
    output = work / "parts" / f"{name}.json"
    command = cli("bench", work / "weights" / bundle, *less, *words, "--no-cold", "--no-plots",
                  "--json", output)  # fmt: skip
    return Job(name=name, part=part, command=command, output=output, limit=150, needs=(needs,))


def cli(*words: object) -> tuple[str, ...]:
    return sys.executable, "-m", "pixart_rt", *map(str, words)


def extra(work: Path) -> list[Job]:
    """What takes minutes of its own, when asked."""
    output = work / "parts" / "profile.json"
    return [
        Job(name="sanitizer", part="sanitizer",  # the allocator's large pieces would hide overruns
            command=("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool",
                     "memcheck", "--error-exitcode", "9", *PYTEST, "-x",
                     "tests/kernels/test_catalog.py", "-k", "agree_with_their_references")),
        Job(name="profile", part="profile", output=output,
            command=(sys.executable, "-m", "benchmarks.profile_kernels", "--json", str(output))),
        image(work, "image-compiled", "xl-bundle", False, "--peer", "diffusers-compile",
              needs="image-build", part="image-compiled"),
    ]  # fmt: skip
