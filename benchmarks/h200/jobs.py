"""What is measured, in which order: what compiles longest and matters most begins first.

First what is not timed; then, one by one, what the host's speed enters (eager forms, whole images);
then what compiles, side by side, until time runs out. The parts
of `EXTRA` take minutes of their own and are run when asked: the kernels' tests under
compute-sanitizer, Nsight Compute's figures, TensorRT-RTX, and the search for kernel configurations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from benchmarks.h200.pool import Job, Stage

PARTS = ("checks", "limits", "steps", "loop", "kernels", "training", "image")
EXTRA = ("sanitizer", "profile", "rtx", "tune", "image-compiled")
RESOLUTIONS = (1024, 256, 512)
BATCHES = (2, 32)  # rows of a step: one image with guidance, sixteen
SLOTS = 6  # of 16 cores: a compilation is one busy thread and a few workers
EAGER = ("diffusers", "ours fused", "ours fused in one graph", "ours fused fp8 in one graph")
COMPILED = ("diffusers compiled", "ours reference compiled")
TRAINING_FORMS = ("diffusers", "diffusers compiled blocks", "ours compiled", "ours compiled fused",
                  "ours compiled fused selective")  # fmt: skip


def stages(out: Path, parts: Iterable[str], small: bool) -> list[Stage]:
    """The jobs of some parts and what they need; `small` ones take seconds and need no GPU."""
    every = [
        Stage(jobs=(*checks(small), *making_images(out, small)), slots=3),
        Stage(jobs=(*first(out, small), against(out, "image", "diffusers", small))),
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


def bench(out: Path, part: str, name: str, module: str, *words: object) -> Job:
    """A benchmark of this folder, which writes JSON."""
    output = out / "parts" / f"{name}.json"
    command = (sys.executable, "-u", "-m", module, *map(str, words), "--json", str(output))
    return Job(name=name, part=part, command=command, output=output)


def checks(small: bool) -> list[Job]:
    """The kernels' own tests, which run on the GPU where there is one, on poisoned memory."""
    which = ["tests/kernels/test_solver.py"] if small else ["tests/kernels"]
    many = ["-n", "8"] if find_spec("xdist") is not None else []
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which, *many)
    return [Job(name="kernel-tests", part="checks", command=command)]


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
    folder, words = out / "parts" / "xl", ("--small",) if small else ()
    return [
        Job(name="image-folder", part="image",
            command=(sys.executable, "-m", "benchmarks.xl_folder", str(folder), *words)),
        Job(name="image-build", part="image", needs=("image-folder",),
            command=cli("build", "--model", folder, "--res", 1024, "--backend", "torch", "--out",
                        out / "parts" / "xl-bundle")),
    ]  # fmt: skip


def cli(*words: object) -> tuple[str, ...]:
    return sys.executable, "-m", "pixart_rt", *map(str, words)


def against(out: Path, part: str, peer: str, small: bool) -> Job:
    """From a prompt to an image, beside a peer."""
    less = ("--steps", "2", "--repeats", "1", "--warmup", "1") if small else ("--repeats", "5")
    output = out / "parts" / f"bench-xl-1024-{peer}.json"
    command = cli("bench", out / "parts" / "xl-bundle", "--peer", peer, "--no-cold", *less,
                  "--json", output)  # fmt: skip
    return Job(name=f"image-{peer}", part=part, needs=("image-build",), output=output,
               command=command)  # fmt: skip


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
        Job(name="rtx-build", part="rtx", needs=("image-folder",),
            command=cli("build", "--model", parts / "xl", "--res", 1024, "--backend",
                        "tensorrt-rtx", "--text-encoder", "torch", "--out", bundle)),
        Job(name="rtx-bench", part="rtx", needs=("rtx-build",), output=figures,
            command=cli("bench", bundle, "--no-cold", "--repeats", 5, "--json", figures)),
        against(out, "image-compiled", "diffusers-compile", small=False),
        Job(name="tune", part="tune", output=parts / "tuned.json",
            command=cli("tune", "--out", parts / "tuned.json")),
    ]  # fmt: skip
