"""What is measured, in which order: what compiles longest and matters most begins first.

Forms that the host's speed enters (eager ones) run before anything compiles beside them. The parts
of `EXTRA` take minutes of their own and are run when asked: the kernels' tests under
compute-sanitizer, Nsight Compute's figures, TensorRT-RTX, and the search for kernel configurations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.h200.pool import Job, Stage

PARTS = ("checks", "limits", "steps", "loop", "kernels", "training", "image")
EXTRA = ("sanitizer", "profile", "rtx", "tune")
RESOLUTIONS = (1024, 256, 512)
BATCHES = (2, 32)  # rows of a step: one image with guidance, sixteen
SLOTS = 6  # of 16 cores: a compilation is one busy thread and a few workers
EAGER = ("diffusers", "ours fused", "ours fused in one graph", "ours fused fp8 in one graph")
COMPILED = ("diffusers compiled", "ours reference compiled")
TRAINING_FORMS = ("diffusers", "diffusers compiled blocks", "ours compiled", "ours compiled fused",
                  "ours compiled fused selective")  # fmt: skip


def stages(out: Path, parts: Iterable[str], small: bool) -> list[Stage]:
    """The jobs of some parts; `small` ones take seconds each and run without a GPU."""
    wanted = set(parts)

    def only(jobs: Iterable[Job], slots: int = 1) -> Stage:
        return Stage(jobs=tuple(job for job in jobs if job.part in wanted), slots=slots)

    return [
        only([*checks(out, small), *first(out, small)]),
        only(together(out, small), 2 if small else SLOTS),
        only(image(out, small)),
        only(extra(out)),
    ]


def bench(out: Path, part: str, name: str, module: str, *words: object) -> Job:
    """A benchmark of this folder, which writes JSON."""
    output = out / "parts" / f"{name}.json"
    command = (sys.executable, "-u", "-m", module, *map(str, words), "--json", str(output))
    return Job(name=name, part=part, command=command, output=output)


def checks(out: Path, small: bool) -> list[Job]:
    """The kernels' own tests, which run on the GPU where there is one, on poisoned memory."""
    which = ["tests/kernels/test_solver.py"] if small else ["tests/kernels"]
    words = [] if small else ["-n", "8", "-p", "no:cacheprovider"]
    return [
        Job(name="kernel-tests", part="checks",
            command=(sys.executable, "-m", "pytest", "-q", *which, *words)),
    ]  # fmt: skip


def first(out: Path, small: bool) -> list[Job]:
    """What must not share the host."""
    words = ["--res", 64] if small else ["--res", 256, 512, 1024, "--batch", *BATCHES]
    forms = ",".join(EAGER)
    return [
        bench(out, "limits", "limits", "benchmarks.limits", "--minutes", 1),
        bench(out, "steps", "steps-eager", "benchmarks.model", *words, "--forms", forms,
              "--minutes", 1.5),
    ]  # fmt: skip


def together(out: Path, small: bool) -> list[Job]:
    """What compiles, side by side; each takes the GPU for itself while it measures."""
    resolutions = (64,) if small else RESOLUTIONS
    batches = (2,) if small else BATCHES

    def step(form: str, pixels: int, batch: int) -> Job:
        name = f"steps-{form.replace(' ', '-')}-{pixels}-x{batch}"
        return bench(out, "steps", name, "benchmarks.model", "--res", pixels, "--batch", batch,
                     "--forms", form)  # fmt: skip

    compiled = {
        (form, batch): [step(form, pixels, batch) for pixels in resolutions]
        for batch in batches
        for form in COMPILED
    }
    theirs, ours = COMPILED
    return [
        *compiled[theirs, 2],
        *training(out, small),
        *loops(out, small),
        *making_images(out, small),
        bench(out, "kernels", "kernels", "benchmarks.kernels", "--minutes", 2),
        *(job for batch in batches[1:] for job in compiled[theirs, batch]),
        *(job for batch in batches for job in compiled[ours, batch]),
    ]


def training(out: Path, small: bool) -> list[Job]:
    forms = "diffusers,ours,ours compiled" if small else ",".join(TRAINING_FORMS)
    words: list[object] = ["--steps", 1, "--model", "tiny"] if small else ["--steps", 3]
    return [
        bench(out, "training", f"training-{pixels}", "benchmarks.train_step", "--res", pixels,
              "--forms", forms, *words)
        for pixels in ((64,) if small else RESOLUTIONS)
    ]  # fmt: skip


def loops(out: Path, small: bool) -> list[Job]:
    if small:
        words = ("--model", "tiny", "--steps", 1)
        return [bench(out, "loop", "loop-256", "benchmarks.loop", "--res", 256, *words)]
    return [
        bench(out, "loop", f"loop-{pixels}", "benchmarks.loop", "--res", pixels, "--images", 1, 16,
              "--qualities", "high,fast")
        for pixels in RESOLUTIONS
    ]  # fmt: skip


def making_images(out: Path, small: bool) -> list[Job]:
    """The pipeline of XL size with random weights, and its bundle."""
    return [
        folder(out, "image", small),
        Job(name="image-build", part="image", needs=("image-folder",),
            command=cli("build", "--model", out / "parts" / "xl", "--res", 1024, "--backend",
                        "torch", "--out", out / "parts" / "xl-bundle")),
    ]  # fmt: skip


def folder(out: Path, part: str, small: bool) -> Job:
    words = ("--small",) if small else ()
    command = (sys.executable, "-m", "benchmarks.xl_folder", str(out / "parts" / "xl"), *words)
    return Job(name=f"{part}-folder", part=part, command=command)


def cli(*words: object) -> tuple[str, ...]:
    return sys.executable, "-m", "pixart_rt", *map(str, words)


def image(out: Path, small: bool) -> list[Job]:
    """From a prompt to an image; diffusers eager first, for compiling it may not end in time."""
    bundle = out / "parts" / "xl-bundle"
    less = ("--steps", "1", "--repeats", "1", "--warmup", "0") if small else ("--repeats", "5")

    def against(peer: str) -> Job:
        output = out / "parts" / f"bench-xl-1024-{peer}.json"
        return Job(
            name=f"image-{peer}", part="image", needs=("image-build",), output=output,
            command=cli("bench", bundle, "--peer", peer, "--no-cold", *less, "--json", output),
        )  # fmt: skip

    return [against("diffusers"), *([] if small else [against("diffusers-compile")])]


def extra(out: Path) -> list[Job]:
    """What is run when asked; needs a GPU."""
    parts, bundle = out / "parts", out / "parts" / "rtx-bundle"
    figures, timed = parts / "rtx-bench.json", parts / "profile.json"
    return [
        Job(name="sanitizer", part="sanitizer",
            command=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
                     sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                     "tests/kernels/test_catalog.py", "-k", "agree_with_their_references")),
        Job(name="profile", part="profile", output=timed,
            command=(sys.executable, "-m", "benchmarks.profile_kernels", "--json", str(timed))),
        folder(out, "rtx", small=False),
        Job(name="rtx-build", part="rtx", needs=("rtx-folder",),
            command=cli("build", "--model", parts / "xl", "--res", 1024, "--backend",
                        "tensorrt-rtx", "--text-encoder", "torch", "--out", bundle)),
        Job(name="rtx-bench", part="rtx", needs=("rtx-build",), output=figures,
            command=cli("bench", bundle, "--no-cold", "--repeats", 5, "--json", figures)),
        Job(name="tune", part="tune", output=parts / "tuned.json",
            command=cli("tune", "--out", parts / "tuned.json")),
    ]  # fmt: skip
