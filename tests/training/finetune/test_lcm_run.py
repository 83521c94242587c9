"""Distillation in the trainer: a run that is taken up again, what it logs and what it counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.flops import step_flops, text_model
from pixart_rt.training.objectives.lcm import ConsistencyDistillation
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import Checkpointing
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.trainer import Trainer

SCRIPT = Path(__file__).parents[1] / "small_run.py"
spec = importlib.util.spec_from_file_location("small_run_of_lcm", SCRIPT)
assert spec is not None and spec.loader is not None
small_run = sys.modules["small_run_of_lcm"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small_run)


@pytest.fixture
def ranks():
    with start_ranks("cpu") as ranks:
        yield ranks


def make_trainer(out: Path, steps: int, ranks, poisoned: int | None = None, **changed) -> Trainer:
    base = small_run.make_objective()
    null = NullText(base.null_embeds, base.get_buffer("null_mask"))
    objective = ConsistencyDistillation(base.model, GaussianDiffusion(), null)
    feed = small_run.MadeUpFeed(small_run.make_sampler(), ranks, poisoned)
    settings = small_run.make_settings(steps, weight_decay=0.0, save_every=2, **changed)
    return Trainer(objective, feed, settings, out, ranks)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in trainer.objective.state_dict().items()}


def test_a_run_goes_on_bit_by_bit_with_its_target(ranks, tmp_path):
    whole = make_trainer(tmp_path / "whole", 5, ranks)
    start = weights(whole)
    whole.run()
    make_trainer(tmp_path / "parts", 2, ranks).run()
    again = make_trainer(tmp_path / "parts", 5, ranks)
    again.run()
    expected, found = weights(whole), weights(again)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    moved = {name for name in expected if not torch.equal(expected[name], start[name])}
    assert {name.split(".")[0] for name in moved} == {"model", "target"}
    name = "x_embedder.weight"
    assert not torch.equal(expected[f"model.{name}"], expected[f"target.{name}"])


def test_full_checkpointing_changes_no_gradient(ranks, tmp_path):
    plain = make_trainer(tmp_path / "a", 1, ranks)
    saving = make_trainer(tmp_path / "b", 1, ranks, checkpointing=Checkpointing.FULL)
    for trainer in (plain, saving):
        trainer.step(next(iter(trainer.feed(0, 1))))
    expected, found = weights(plain), weights(saving)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)


def test_timesteps_and_flops_are_those_of_the_passes(ranks, tmp_path):
    objective = make_trainer(tmp_path, 1, ranks).objective
    batch = small_run.MadeUpFeed(small_run.make_sampler(), ranks).batch(0)
    t = objective(batch, draw(3, 0, batch))["timesteps"]
    assert ((t + 1) % 20 == 0).all() and t.min() >= 19 and t.max() <= 999
    bucket, config = batch.bucket, objective.model.config
    products = text_model(config, bucket.num_tokens, config.max_text_tokens)
    once = step_flops(products, full_checkpointing=True)
    found = objective.flops(bucket, True)
    assert found.forward == 4 * sum(each.flops for each in products)
    assert (found.backward, found.recomputed) == (once.backward, once.recomputed)


def test_a_step_that_was_not_finite_moves_no_target(ranks, tmp_path):
    """The student has moved before, so a target that followed it again would be elsewhere."""
    trainer = make_trainer(tmp_path, 2, ranks, poisoned=1)
    batches = iter(trainer.feed(0, 2))
    trainer.step(next(batches))
    before = weights(trainer)
    name = "x_embedder.weight"
    assert not torch.equal(before[f"model.{name}"], before[f"target.{name}"])
    assert trainer.step(next(batches)).found_inf.item() == 1
    after = weights(trainer)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
