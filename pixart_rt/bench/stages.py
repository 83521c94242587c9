"""Where the time of one request goes, by the clock of the device.

The stages follow each other and make up the whole:
    text_encoder   inside the text encoder's calls, or the replays of its graph
    denoising      from the transformer's first call to the VAE decoder's: steps, guidance, solver
    vae_decoder    inside the decoder's calls
    rest           everything else: tokenizer, plan, pixels to images

On a GPU a mark is an event on the current stream, read after the request; the host never waits
in between, so what is measured is not slowed down. A part's own time may include the device's
waiting for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from pixart_rt.bench.timing import between, mark, settle

STAGES = ("text_encoder", "denoising", "vae_decoder", "rest")
TEXT, STEP, VAE = "text_encoder", "transformer", "vae_decoder"  # the parts that are watched


class Watched:
    """A callable with a mark before and after each call. Its other attributes pass through."""

    def __init__(self, inner: Any, part: str, stages: Stages) -> None:
        self._inner, self._part, self._stages = inner, part, stages

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._stages.capturing():  # a mark inside a graph would never be read
            return self._inner(*args, **kwargs)
        before = mark(self._stages.device)
        result = self._inner(*args, **kwargs)
        self._stages.add(self._part, before, mark(self._stages.device))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Stages:
    """The marks of one request at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._calls: list[tuple[str, Any, Any]] = []

    def watch(self, owner: Any, attribute: str, part: str) -> None:
        """Mark every call of `owner.attribute` from now on."""
        setattr(owner, attribute, Watched(getattr(owner, attribute), part, self))

    def capturing(self) -> bool:
        """Whether a CUDA graph is being recorded now."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def add(self, part: str, before: Any, after: Any) -> None:
        self._calls.append((part, before, after))

    def measure(self, request: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Run `request`. Returns its result and seconds: `total`, each of STAGES, `steps`."""
        self._calls.clear()
        settle(self.device)
        started, first = time.perf_counter(), mark(self.device)
        result = request()
        settle(self.device)
        total = time.perf_counter() - started
        calls = [(part, between(first, a), between(first, b)) for part, a, b in self._calls]
        return result, {"total": total, **split(calls, total)}


def split(calls: list[tuple[str, float, float]], total: float) -> dict[str, Any]:
    """Calls (part, begin, end) in seconds since the request began to the stages' seconds.

    `steps` are the transformer's calls themselves. Without any (a loop captured as one graph calls
    none) denoising begins where the text encoder ended.
    """
    text = [(begin, end) for part, begin, end in calls if part == TEXT]
    steps = [(begin, end) for part, begin, end in calls if part == STEP]
    decoder = [(begin, end) for part, begin, end in calls if part == VAE]
    if not decoder:
        raise RuntimeError("the VAE decoder was not called: the stages cannot be told apart")
    begin = steps[0][0] if steps else max((end for _, end in text), default=0.0)
    seconds = {
        "text_encoder": sum(end - start for start, end in text if start < begin),
        "denoising": decoder[0][0] - begin,
        "vae_decoder": sum(end - start for start, end in decoder),
    }
    seconds["rest"] = total - sum(seconds.values())
    return {**seconds, "steps": [end - start for start, end in steps]}
