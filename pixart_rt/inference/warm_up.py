"""The first request of each shape, made before anyone waits for it: compilation and CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pixart_rt.buckets import Bucket, bucket_for_aspect, buckets
from pixart_rt.inference.call_state import Progress
from pixart_rt.inference.generation import make_inputs, resolve
from pixart_rt.inference.request import Request

if TYPE_CHECKING:
    from pixart_rt.inference.pipeline import PixArtPipeline

WARMUP_PROMPTS = ("a red circle above a blue square", " ".join(["a quiet harbour"] * 8))


def one_of_each_token_count(
    resolution: int, asked: Sequence[Bucket | str] | None
) -> tuple[Bucket, ...]:
    """A bucket for each token count of those asked, by default of all 40."""
    chosen: dict[int, Bucket] = {}
    for shape in asked if asked is not None else buckets(resolution):
        bucket = shape if isinstance(shape, Bucket) else bucket_for_aspect(resolution, shape)
        chosen.setdefault(bucket.num_tokens, bucket)
    return tuple(chosen.values())


def warm_up(
    pipe: PixArtPipeline,
    requests: Sequence[Request],
    shapes: Sequence[Bucket],
    batch_size: int,
    progress: Progress | None,
) -> int:
    """Run, and where possible capture, batches of each request at each shape; the graphs captured.

    See PixArtPipeline.warmup, whose turn this is.
    """
    before = _num_captures(pipe)
    work = [(bucket, request) for bucket in shapes for request in requests]
    with _reporting(progress) as report:
        if pipe.prompt_encoder is not None:
            report("text encoder", 0, len(work))
            for num_prompts in sorted({1, batch_size}):
                pipe.prompt_encoder.warm(num_prompts)
        for index, (bucket, request) in enumerate(work):
            report(f"{bucket.num_tokens} tokens", index, len(work))
            control = pipe.controls.blank(bucket) if pipe.controls.wanted else None
            shaped = replace(
                request, height=bucket.height, width=bucket.width, control_latents=control
            )
            resolved = resolve(pipe, [shaped])
            [image] = make_inputs(pipe, resolved)
            pipe.denoiser.warm([image] * batch_size, resolved[0].sampling)
        report("ready", len(work), len(work))
    return _num_captures(pipe) - before


def _num_captures(pipe: PixArtPipeline) -> int:
    texts = 0 if pipe.prompt_encoder is None else pipe.prompt_encoder.graphs.captures
    return pipe.denoiser.graphs.captures + texts


@contextmanager
def _reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's own progress, or a bar on stderr."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("warmup", total=None)
        yield lambda name, done, total: bar.update(
            task, description=name, completed=done, total=total
        )
