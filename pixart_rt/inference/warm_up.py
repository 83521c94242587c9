"""The first request of each shape, made before anyone waits for it: compilation and CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pixart_rt.buckets import Bucket, bucket_for_aspect, buckets
from pixart_rt.inference.call_state import Progress
from pixart_rt.inference.cuda_graphs import Graphs
from pixart_rt.inference.decoding import decode
from pixart_rt.inference.generation import make_inputs, resolve
from pixart_rt.inference.request import Request

if TYPE_CHECKING:
    from pixart_rt.inference.pipeline import PixArtPipeline

logger = logging.getLogger(__name__)

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
    """Run, and where possible capture, batches of each request at each shape, and decode one; the
    graphs that are kept of it.

    See PixArtPipeline.warmup, whose turn this is.
    """
    graphs: list[Graphs[Any]] = [pipe.denoiser.graphs]
    if pipe.prompt_encoder is not None:
        graphs.append(pipe.prompt_encoder.graphs)
    before = [(set(each), each.captures) for each in graphs]
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
        for bucket in shapes:
            report(f"decoder {bucket.width}x{bucket.height}", len(work), len(work))
            latents = pipe.controls.blank(bucket).repeat(batch_size, 1, 1, 1)
            profiles = pipe.manifest.components["vae_decoder"].profiles
            decode(latents, pipe.vae_decoder, profiles, tiled=pipe.vae_tiling)
        report("ready", len(work), len(work))
    pairs = list(zip(graphs, before, strict=True))
    captured = sum(each.captures - earlier for each, (_, earlier) in pairs)
    kept = sum(len(set(each) - keys) for each, (keys, _) in pairs)
    if kept < captured:
        logger.warning(
            "%d CUDA graphs were captured, %d are kept: the others went for lack of memory "
            "(denoiser.graphs.max_bytes); warm up fewer shapes", captured, kept,
        )  # fmt: skip
    return kept


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
