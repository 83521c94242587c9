"""Reused steps: which they are, that none is reused at 0, and that the output says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.approximations import FirstBlockCache, StepCache, one_approximation
from pixart_rt.config import EngineConfig
from pixart_rt.errors import ConfigError
from pixart_rt.evaluation.fidelity import PROMPTS, Variant, judge
from pixart_rt.export.build import build
from pixart_rt.inference.cuda_graphs import Graphs
from pixart_rt.inference.step_cache import (
    FirstBlockRun,
    Skipping,
    modulation_changes,
    steps_to_skip,
)

PROMPT = "a red circle above a blue square"
STEPS = 8
GUIDED = (True,) * STEPS
pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> PixArtPipeline:
    """Tiny in PyTorch, two images at once."""
    folder = tmp_path_factory.mktemp("tiny") / "b"
    build("tiny", folder, EngineConfig(resolution=256, backend="torch", max_batch=2))
    return PixArtPipeline.from_bundle(folder, "cpu")


def run(pipe: PixArtPipeline, **arguments: Any) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    values = {"prompt": PROMPT, "num_inference_steps": STEPS, "output_type": "latent", "seed": 3}
    output = pipe(**{**values, **arguments})
    return output.images, output.skipped_steps


class Counting:
    """The transformer with a count of its calls, as a wrapper that has no `cacheable`."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.also_takes, self.capturable = inner, inner.also_takes, inner.capturable
        self.calls = 0

    def version(self) -> Any:
        return self.inner.version()

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(**inputs)


def test_changes_are_relative_to_the_step_before() -> None:
    modulation = torch.zeros(4, 1, 7, 3)
    for step, value in enumerate((2.0, 3.0, 3.0, -1.5)):
        modulation[step, :, :6] = value
    modulation[:, :, 6] = torch.randn(4, 1, 3) * 100  # the final layer's: not the blocks'
    torch.testing.assert_close(
        modulation_changes(modulation), torch.tensor([0, 0.5, 0, 1.5]).double()
    )
    two = torch.cat([modulation, modulation.square()], dim=1)  # 4, 9, 9, 2.25
    expected = torch.tensor([0, 1.25, 0, 1.5]).double()
    torch.testing.assert_close(modulation_changes(two), expected)
    assert modulation_changes(modulation[:1]).tolist() == [0]


@pytest.mark.parametrize(("threshold", "skipped"), [
    (0.0, ()),
    (0.25, (1, 3, 6)),  # 0.25 is not below it; every run of steps begins to count anew
    (0.5, (1, 3, 4, 6)),
    (0.625, (1, 2, 4, 6)),
    (9.0, (1, 2, 3, 4, 5, 6)),
])  # fmt: skip
def test_the_pattern_of_a_known_plan(threshold: float, skipped: tuple[int, ...]) -> None:
    changes = [0.0, 0.125, 0.375, 0.125, 0.25, 0.5, 0.125, 0.0]
    assert steps_to_skip(changes, GUIDED, threshold) == skipped


def test_a_step_where_guidance_changes_always_runs() -> None:
    guides = (False, False, True, True, True, False, False, False)
    assert steps_to_skip([0.0] * 8, guides, 1.0) == (1, 3, 4, 6)
    for steps in (1, 2):
        assert steps_to_skip([0.0] * steps, (True,) * steps, 1.0) == ()


def test_skipped_counts_grow_with_the_threshold() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        changes = [0.0, *(torch.rand(19, generator=random) ** 3).tolist()]
        guides = (True,) * 12 + (False,) * 8
        counts = [len(steps_to_skip(changes, guides, t / 20)) for t in range(60)]
        assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 10


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "ddim"])
@pytest.mark.parametrize("approximate", [StepCache(0), FirstBlockCache(0)])
def test_a_threshold_of_nothing_changes_nothing(
    pipe: PixArtPipeline, approximate: Any, scheduler: str
) -> None:
    exact, skipped = run(pipe, scheduler=scheduler)
    assert skipped == [()]
    actual, skipped = run(pipe, scheduler=scheduler, approximate=approximate)
    assert torch.equal(actual, exact) and skipped == [()]


@pytest.mark.parametrize("scheduler", ["dpm-solver++", "ddim"])
def test_the_model_does_not_run_at_skipped_steps(pipe: PixArtPipeline, scheduler: str) -> None:
    transformer = pipe.transformer
    pipe.transformer = counting = Counting(transformer)
    try:
        image, [skipped] = run(pipe, scheduler=scheduler, approximate=StepCache(0.3))
    finally:
        pipe.transformer = transformer
    assert len(skipped) > 0 and counting.calls == STEPS - len(skipped)
    assert 0 not in skipped and STEPS - 1 not in skipped
    exact, _ = run(pipe, scheduler=scheduler)
    assert 1e-3 < float((image - exact).norm() / exact.norm()) < 2


def test_skipped_steps_reuse_the_output_as_it_was() -> None:
    """Against the formula: the output of step s is that of the last step that ran."""
    outputs = iter(torch.randn(5, 2, 3, 4))
    seen = [next(outputs) for _ in range(5)]
    run_of = Skipping(iter(seen).__next__, (1, 2, 4))
    assert [torch.equal(run_of(), seen[k]) for k in (0, 0, 0, 1, 1, 2)] == [True] * 6


def test_both_caches_skip_more_with_a_higher_threshold(pipe: PixArtPipeline) -> None:
    for kind in (StepCache, FirstBlockCache):
        images, skipped = zip(
            *(run(pipe, approximate=kind(t)) for t in (0.05, 0.3, 1e9)), strict=True
        )
        counts = [len(each[0]) for each in skipped]
        assert counts == sorted(counts)
        assert skipped[-1] == [tuple(range(1, STEPS - 1))]
        assert not torch.equal(images[-1], run(pipe)[0])


def test_the_first_block_cache_reuses_what_the_other_blocks_added() -> None:
    """A model of three numbers: x_1 = x + a, x_L = x_1 + b; a decides, b is reused."""
    adds = iter([(1.0, 5.0), (1.05, 7.0), (1.09, 8.0), (1.2, 9.0), (1.2, 3.0)])
    x = torch.zeros(2, 3, 4)

    def model(cache: Any) -> torch.Tensor:
        first, rest = next(adds)
        reused = cache.reused(x, x + first)
        if reused is not None:
            return reused
        cache.keep(x + first + rest)
        return x + first + rest

    steps = FirstBlockRun(model, 5, 0.1)
    out = [float(steps()[0, 0, 0]) for _ in range(5)]
    # 1.09 is compared with 1, not with 1.05; the last step runs although nothing changed
    assert out == pytest.approx([6.0, 6.05, 6.09, 10.2, 4.2]) and steps.skipped == (1, 2)


def test_one_row_that_changed_makes_the_batch_run() -> None:
    before, after = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    steps = FirstBlockRun(lambda **_: before, 5, 0.1)
    assert steps.reused(before, after) is None
    steps.keep(after)
    changed = after.clone()
    changed[1] = 1.2
    assert steps.reused(before, changed) is None
    assert steps.reused(before[:1], after[:1]) is None, "other rows, other guidance"


@pytest.mark.parametrize("thresholds", [(99, None), (None, 1.5), (-0.1, None), (math.nan, None)])
def test_thresholds_that_leave_noise_are_refused(thresholds: tuple[float | None, ...]) -> None:
    with pytest.raises(ConfigError, match="its threshold is from 0 to 1"):
        one_approximation(*thresholds)


def test_guidance_that_stops_is_not_reused_across(pipe: PixArtPipeline) -> None:
    for approximate in (StepCache(1e9), FirstBlockCache(1e9)):
        _, [skipped] = run(pipe, approximate=approximate, guidance_interval=(0, 0.5))
        assert skipped == (1, 2, 3, 5, 6)


def test_every_image_says_its_steps(pipe: PixArtPipeline) -> None:
    """Five images in batches of two; the step cache's pattern does not depend on them."""
    images, skipped = run(pipe, prompt=[*PROMPTS[:5]], approximate=StepCache(0.3))
    assert len(images) == 5 and len(skipped) == 5 and len(set(skipped)) == 1
    alone, _ = run(pipe, prompt=PROMPTS[4], approximate=StepCache(0.3), seed=3 + 4)
    assert float((images[4:] - alone).norm() / alone.norm()) < 1e-5  # sums in another order


def test_a_captured_graph_is_of_its_skipped_steps(pipe: PixArtPipeline) -> None:
    """On the CPU a graph is a run kept with its inputs; what counts is which is found."""
    captured = []

    class Recorded:
        num_bytes = 0

        def __init__(self, run_loop: Any, inputs: Any) -> None:
            captured.append(self)
            self._run, self._inputs = run_loop, inputs
            self.output = run_loop(inputs)

        def replay(self) -> None:
            self.output.copy_(self._run(self._inputs))

    denoiser = pipe.denoiser
    kept, denoiser.graphs = denoiser.graphs, Graphs(capture=Recorded)
    transformer = pipe.transformer
    pipe.transformer = counting = Counting(transformer)
    expected = {t: run(pipe, approximate=StepCache(t)) for t in (0.0, 0.3)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(denoiser, "captures", lambda: True)
            for threshold in expected:
                pipe.warmup(["1:1"], num_inference_steps=STEPS, prompts=[PROMPT],
                            approximate=StepCache(threshold), progress=lambda *_: None)  # fmt: skip
        assert len(captured) == 2
        for threshold, (image, skipped) in expected.items():
            counting.calls = 0
            replayed, again = run(pipe, approximate=StepCache(threshold))
            assert torch.equal(replayed, image) and again == skipped
            assert counting.calls == STEPS - len(skipped[0])
        assert denoiser.graphs.replays == 2
    finally:
        pipe.transformer, denoiser.graphs = transformer, kept


def test_the_first_block_cache_needs_a_transformer_that_can_stop(
    pipe: PixArtPipeline, bundle_256: Path
) -> None:
    engines = PixArtPipeline.from_bundle(bundle_256, "cpu")
    with pytest.raises(ConfigError, match=r"first-block-cache 0\.1 was requested.*step cache"):
        run(engines, approximate=FirstBlockCache(0.1))
    _, [skipped] = run(engines, approximate=StepCache(1e9))
    assert skipped == tuple(range(1, STEPS - 1)), "an engine can do the other"
    transformer = pipe.transformer
    pipe.transformer = Counting(transformer)
    try:
        with pytest.raises(ConfigError, match="cannot stop"):
            run(pipe, approximate=FirstBlockCache(0.1))
    finally:
        pipe.transformer = transformer


@pytest.mark.parametrize("kind", [StepCache, FirstBlockCache])
@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_impossible_thresholds_are_refused(kind: Any, threshold: float) -> None:
    with pytest.raises(ConfigError, match="a number >= 0"):
        kind(threshold)


def test_one_cache_at_a_time() -> None:
    assert one_approximation(None, None) is None
    assert one_approximation(0.0, None) == StepCache(0.0)
    assert one_approximation(None, 0.2) == FirstBlockCache(0.2)
    with pytest.raises(ConfigError, match="choose one"):
        one_approximation(0.1, 0.1)


def test_variants_are_judged_against_the_exact_image(pipe: PixArtPipeline) -> None:
    variants = [
        Variant(name="nothing", approximate=StepCache(0)),
        Variant(name="much", approximate=StepCache(0.5)),
        Variant(name="half", guidance_stop=0.5),
        Variant(name="lcm", student=pipe, scheduler="lcm", num_inference_steps=2),
    ]
    nothing, much, half, lcm = judge(
        pipe, variants, prompts=PROMPTS[:2], num_inference_steps=STEPS, seed=5
    )
    assert nothing.psnr == math.inf and nothing.ssim == 1 and nothing.skipped == 0
    assert nothing.to_dict()["psnr_db"] is None, "JSON has no infinity"
    for found in (much, half, lcm):
        assert found.worst_psnr <= found.psnr < 60 and found.worst_ssim <= found.ssim < 1
    assert much.skipped > 0 and much.unguided == 0
    assert half.skipped == 0 and half.images[0].unguided_steps == (4, 5, 6, 7)
    assert [each.seed for each in half.images] == [5, 6] and lcm.num_steps == 2
    with pytest.raises(ConfigError, match="at least one of each"):
        judge(pipe, [])
