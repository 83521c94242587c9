"""What is measured, in which order: what matters most first, what compiles side by side.

First, one by one, what the host's speed enters (eager forms) and what compiles nothing. Then what
compiles, until time runs out. The parts of `EXTRA` take minutes of their own and are run when
asked: the kernels' tests under compute-sanitizer, Nsight Compute's figures, an image beside
diffusers compiled, TensorRT-RTX, and the search for kernel configurations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.h200.pool import Job, Stage

PARTS = ("limits", "steps", "loop", "kernels", "training", "checks", "image")
EXTRA = ("sanitizer", "profile", "rtx", "tune", "image-compiled")
RESOLUTIONS = (1024, 256, 512)
BATCHES = (2, 32)  # rows of a step: one image with guidance, sixteen
SLOTS = 6  # of 16 cores: a compilation is one busy thread and a few workers
EAGER = ("ours fused in one graph", "diffusers", "ours fused", "ours fused fp8 in one graph")
THEIRS, OURS = "diffusers compiled", "ours reference compiled"
TRAINING_FORMS = ("diffusers compiled blocks", "ours compiled fused", "ours compiled", "diffusers",
                  "ours compiled fused selective")  # fmt: skip


def stages(out: Path, parts: Iterable[str], small: bool) -> list[Stage]:
    """The jobs of some parts and what they need; `small` ones take seconds and need no GPU."""
    every = [
        Stage(jobs=tuple(first(out, small))),
        Stage(jobs=tuple(together(out, small)), slots=2 if small else SLOTS),
        Stage(jobs=tuple(extra(out))),
    ]
    jobs = {job.name: job for stage in every for job in stage.jobs}
    wanted = {name for name, job in jobs.items() if job.part in parts}
    for name in reversed(jobs):  # a job stands after those it needs
        if name in wanted:
            wanted |= set(jobs[name].needs)
    return [
        Stage(jobs=tuple(job for job in stage.jobs if job.name in wanted), slots=stage.slots)
        for stage in every
    ]


def bench(out: Path, part: str, name: str, module: str, *words: object, group: str = "") -> Job:
    """A benchmark of this folder, which writes JSON."""
    output = out / "parts" / f"{name}.json"
    command = (sys.executable, "-u", "-m", module, *map(str, words), "--json", str(output))
    return Job(name=name, part=part, command=command, output=output, group=group)


def first(out: Path, small: bool) -> list[Job]:
    """What must not share the host."""
    if small:
        return [
            loop(out, 256, "--model", "tiny", "--steps", 1),
            bench(out, "limits", "limits", "benchmarks.limits"),
            bench(out, "steps", "steps-eager", "benchmarks.model", "--res", 64, "--forms",
                  ",".join(EAGER)),
        ]  # fmt: skip
    return [
        bench(out, "steps", "steps-eager", "benchmarks.model", "--res", *RESOLUTIONS, "--forms",
              ",".join(EAGER), "--minutes", 1),
        bench(out, "limits", "limits", "benchmarks.limits", "--minutes", 0.7),
    ]  # fmt: skip


def together(out: Path, small: bool) -> list[Job]:
    """What takes minutes of CPU time, side by side; each has the GPU for itself to measure."""
    if small:
        return [
            step(out, THEIRS, 64, 2),
            step(out, OURS, 64, 2),
            training(out, 64, "diffusers,ours,ours compiled", "--steps", 1, "--model", "tiny"),
            bench(out, "kernels", "kernels", "benchmarks.kernels"),
            checks("tests/kernels/test_solver.py"),
            *images(out, small),
        ]
    forms = ",".join(TRAINING_FORMS)
    return [
        *(step(out, THEIRS, pixels, 2) for pixels in RESOLUTIONS),
        *(loop(out, pixels) for pixels in RESOLUTIONS),
        *(training(out, pixels, forms, "--steps", 3) for pixels in (256, 512, 1024)),
        bench(out, "kernels", "kernels", "benchmarks.kernels", "--minutes", 2),
        *images(out, small),
        checks("tests/kernels"),
        *(step(out, OURS, pixels, 2) for pixels in RESOLUTIONS),
        *(loop(out, pixels, "--qualities", "fast") for pixels in RESOLUTIONS),
        bench(out, "steps", "steps-eager-x32", "benchmarks.model", "--res", *RESOLUTIONS, "--batch",
              32, "--forms", ",".join(EAGER[::3])),
        *(step(out, form, pixels, 32) for form in (THEIRS, OURS) for pixels in RESOLUTIONS),
        *(loop(out, pixels, "--images", 16, "--prompts", 30) for pixels in RESOLUTIONS),
    ]  # fmt: skip


def step(out: Path, form: str, pixels: int, batch: int) -> Job:
    name = f"steps-{form.replace(' ', '-')}-{pixels}-x{batch}"
    return bench(out, "steps", name, "benchmarks.model", "--res", pixels, "--batch", batch,
                 "--forms", form)  # fmt: skip


def loop(out: Path, pixels: int, *words: object) -> Job:
    name = "-".join(str(word).lstrip("-") for word in ("loop", pixels, *words))
    return bench(out, "loop", name, "benchmarks.loop", "--res", pixels, *words)


def training(out: Path, pixels: int, forms: str, *words: object) -> Job:
    """One at a time: each fills most of the memory."""
    return bench(out, "training", f"training-{pixels}", "benchmarks.train_step", "--res", pixels,
                 "--forms", forms, *words, group="training")  # fmt: skip


def checks(tests: str) -> Job:
    """The kernels' own tests, which run on the GPU where there is one, on poisoned memory."""
    # pytest-benchmark warns where tests run side by side, and the project's warnings are errors;
    # the compiler's output is the same without a GPU.
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", tests,
               "--ignore", "tests/kernels/test_codegen.py")  # fmt: skip
    held = (sys.executable, "-m", "benchmarks.turns", sys.executable, *command)
    return Job(name="kernel-tests", part="checks", command=held)


def images(out: Path, small: bool) -> list[Job]:
    """The pipeline of XL size with random weights, its bundle, and both beside diffusers."""
    folder, words = out / "weights" / "xl", ("--small",) if small else ()
    return [
        Job(name="image-folder", part="image",
            command=(sys.executable, "-m", "benchmarks.xl_folder", str(folder), *words)),
        Job(name="image-build", part="image", needs=("image-folder",),
            command=cli("build", "--model", folder, "--res", 1024, "--backend", "torch", "--out",
                        out / "weights" / "xl-bundle")),
        against(out, "image", "diffusers", small),
    ]  # fmt: skip


def against(out: Path, part: str, peer: str, small: bool) -> Job:
    """From a prompt to an image, beside a peer; the GPU is theirs from loading to the end."""
    less = ("--steps", "2", "--repeats", "1", "--warmup", "1") if small else ("--repeats", "5")
    output = out / "parts" / f"bench-xl-1024-{peer}.json"
    command = cli("bench", out / "weights" / "xl-bundle", "--peer", peer, "--no-cold", *less,
                  "--json", output)  # fmt: skip
    return Job(name=f"image-{peer}", part=part, needs=("image-build",), output=output,
               command=(sys.executable, "-m", "benchmarks.turns", *command))  # fmt: skip


def cli(*words: object) -> tuple[str, ...]:
    return sys.executable, "-m", "pixart_rt", *map(str, words)


def extra(out: Path) -> list[Job]:
    """What is run when asked; needs a GPU."""
    parts, bundle = out / "parts", out / "weights" / "rtx-bundle"
    figures, timed = parts / "rtx-bench.json", parts / "profile.json"
    return [
        Job(name="sanitizer", part="sanitizer",  # the allocator's large pieces would hide overruns
            command=("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool",
                     "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
                     "-x", "-p", "no:cacheprovider", "-p", "no:benchmark",
                     "tests/kernels/test_catalog.py", "-k", "agree_with_their_references")),
        Job(name="profile", part="profile", output=timed,
            command=(sys.executable, "-m", "benchmarks.profile_kernels", "--json", str(timed))),
        Job(name="rtx-build", part="rtx", needs=("image-folder",),
            command=cli("build", "--model", out / "weights" / "xl", "--res", 1024, "--backend",
                        "tensorrt-rtx", "--text-encoder", "torch", "--out", bundle)),
        Job(name="rtx-bench", part="rtx", needs=("rtx-build",), output=figures,
            command=cli("bench", bundle, "--no-cold", "--repeats", 5, "--json", figures)),
        against(out, "image-compiled", "diffusers-compile", small=False),
        Job(name="tune", part="tune", output=parts / "tuned.json",
            command=cli("tune", "--out", parts / "tuned.json")),
    ]  # fmt: skip
