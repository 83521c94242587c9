"""Steps that reuse what an earlier step computed: which, and what stands in for the model.

The step cache knows its steps before the loop, from the plan: with m_s the modulation of step s,

    d_s = mean|m_s - m_(s-1)| / mean|m_(s-1)|        step s is skipped while the sum of d since the
                                                     last step that ran stays below the threshold

TeaCache (arXiv:2411.19108) differs in three ways. It measures the first block's input after its
modulation, of which ours is the factor that holds the timestep; it maps d through a polynomial
fitted for each model, which nobody has published for PixArt; and its code adds a cached residual to
the new input, where here the model's output stands as it was, so that an engine need not be split.

The first-block cache runs the first block of every step and compares what it adds to its input,
r = x_1 - x_0, with that of the last whole step. Where every row of the batch changed by less than
the threshold, x_L = x_1 + (x_L - x_1 of that step), and the final layer sees the present timestep.

The first step, the last one, and those at which guidance begins or ends always run.

S steps, B images, R rows, N tokens, D width, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK_ROWS = 6  # of the modulation's 7: shift, scale and gate of the blocks' two halves


def modulation_changes(modulation: Tensor) -> Tensor:
    """d_s of the formula above for modulation [S, B, 7, D]: float64 [S], 0 for the first step.

    Of images of several sizes the largest change.
    """
    blocks = modulation[:, :, :BLOCK_ROWS].double().flatten(2)
    change = (blocks[1:] - blocks[:-1]).abs().mean(2) / blocks[:-1].abs().mean(2)
    return torch.cat([change.new_zeros(1), change.amax(1)])


def steps_to_skip(
    changes: Sequence[float], guides: Sequence[bool], threshold: float
) -> tuple[int, ...]:
    """The steps, counted from 0, at which the step cache reuses the previous output.

    `changes` as from `modulation_changes`; `guides` says which steps are guided.
    """
    skipped = []
    last = len(changes) - 1
    total = 0.0
    for step, change in enumerate(changes):
        total += change
        may = 0 < step < last and guides[step] == guides[step - 1]
        if may and total < threshold:
            skipped.append(step)
        else:
            total = 0.0
    return tuple(skipped)


class Skipping:
    """The transformer for one run of a loop, silent at the steps `planned`.

    At those it gives its previous output again. Without any it is the transformer.
    """

    def __init__(self, transformer: Callable[..., Tensor], planned: tuple[int, ...] = ()) -> None:
        assert 0 not in planned
        self.planned: tuple[int, ...] | None = planned
        self.skipped = planned
        self._transformer = transformer
        self._step = 0

    def __call__(self, **inputs: Tensor) -> Tensor:
        if self._step not in self.skipped:
            self._output = self._transformer(**inputs)
        self._step += 1
        return self._output


class FirstBlockRun:
    """The transformer for one run of a loop of `num_steps`, and the cache that it asks."""

    planned: tuple[int, ...] | None = None  # not known before the run, so no graph can hold it

    def __init__(self, module: Callable[..., Tensor], num_steps: int, threshold: float) -> None:
        """module: a transformer that takes a `cache` (model/transformer.py, BlockCache)."""
        self.skipped: tuple[int, ...] = ()
        self._module, self._last, self._threshold = module, num_steps - 1, threshold
        self._step = 0
        self._added: Tensor | None = None  # r [R, N, D] of the last whole step
        self._rest: Tensor | None = None  # x_L - x_1 of it

    def __call__(self, **inputs: Tensor) -> Tensor:
        with torch.no_grad():
            output = self._module(**inputs, cache=self)
        self._step += 1
        return output

    def reused(self, before: Tensor, after: Tensor) -> Tensor | None:
        """x_L for the first block's x_0 and x_1 [R, N, D], or None where the others must run."""
        added = after - before
        if self._step < self._last and self._alike(added):
            assert self._rest is not None
            self.skipped += (self._step,)
            return after + self._rest
        self._added, self._after = added, after
        return None

    def keep(self, last: Tensor) -> None:
        """x_L [R, N, D] of a step that ran all blocks."""
        self._rest = last - self._after

    def _alike(self, added: Tensor) -> bool:
        if self._added is None or self._added.shape != added.shape:  # other rows: guidance changed
            return False
        known = self._added.float()
        change = (added.float() - known).abs().mean((1, 2)) / known.abs().mean((1, 2))
        return bool((change < self._threshold).all())  # waits for the device
