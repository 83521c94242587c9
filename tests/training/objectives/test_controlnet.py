"""The ControlNet's objective: loss and gradients from the formulas, and what stays as it was."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pixart_rt.buckets import buckets
from pixart_rt.checkpoints.controlnet import read_controlnet, write_controlnet
from pixart_rt.config import ModelConfig, Precision
from pixart_rt.data.batch import Batch
from pixart_rt.errors import DataError
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig, ControlVariant
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.controlnet import LEARNING_RATE, ControlNetObjective, trained
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import Checkpointing, Parallel, RunSettings
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.trainer import Trainer
from tests.conftest import randomize
from tests.model.plain_controlnet import plain_controlnet

CONFIG = ModelConfig(num_layers=3, num_heads=1, caption_channels=16, sample_size=32,
                     max_text_tokens=9, interpolation_scale=1.0)  # fmt: skip
SCRIPT = Path(__file__).parents[1] / "sharded_controlnet.py"
B, T = 3, 9
TABLE = buckets(256)


def batch_of(index: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Random samples of a bucket."""
    random = torch.Generator().manual_seed(index)
    bucket = TABLE[index]
    shape = (B, 4, bucket.height // 8, bucket.width // 8)
    return Batch(
        ids=torch.tensor([40 + index, 3, 8]),
        latents=torch.randn(shape, generator=random).to(dtype),
        prompt_embeds=torch.randn(B, T, 16, generator=random).to(dtype),
        prompt_mask=torch.arange(T) < torch.tensor([[1], [9], [4]]),
        original_size=torch.tensor([[500.0, 300.0], [2048.0, 2048.0], [64.0, 777.0]]),
        aspect_ratio=torch.full((B, 1), bucket.ratio),
        bucket=bucket,
        condition=torch.randn(shape, generator=random).to(dtype),
    )


def null() -> NullText:
    return NullText(torch.full((T, 16), 0.1, dtype=torch.float64), torch.arange(T) < 1)


def objective_of(variant: str, copies: int = 2, *, untrained: bool = False) -> ControlNetObjective:
    settings = ControlNetConfig(variant=ControlVariant(variant), num_copies=copies)
    if untrained:
        plain = PixArtTransformer(CONFIG).double()
        randomize(plain, 4)
        model = ControlNetTransformer.of(plain, settings)
    else:
        model = ControlNetTransformer(CONFIG, settings).double()
        randomize(model, 4)
    return ControlNetObjective(model, GaussianDiffusion(), null(), text_dropout=0.5)


def plain_losses(objective: ControlNetObjective, batch: Batch, state: dict[str, Tensor]) -> Tensor:
    """The losses [B] from the plain model, with the weights in `state`."""
    draws = draw(0, 5, batch)
    dropped = draws.uniform[:, 1] < 0.5
    assert 0 < int(dropped.sum()) < B, "the step has both kinds of captions"
    embeds = torch.where(dropped[:, None, None], null().embeds, batch.prompt_embeds)
    mask = torch.where(dropped[:, None], torch.arange(T) < 1, batch.prompt_mask)
    diffusion, modulator = objective.diffusion, objective.model.modulator
    t = (draws.uniform[:, 0] * 1000).long()
    noisy = diffusion.q_sample(batch.latents, t, draws.noise)
    assert batch.condition is not None
    tokens = plain_controlnet(
        state, 1, objective.model.controlnet.variant, patchify(noisy, 2),
        position_table(CONFIG, batch.bucket.grid),
        modulator(t.float(), batch.original_size, batch.aspect_ratio.flatten()),
        embeds, mask, patchify(batch.condition, 2),
    )  # fmt: skip
    output = unpatchify(tokens, batch.bucket.grid, 2)
    return diffusion.training_losses(output, batch.latents, t, draws.noise)["loss"]


@pytest.mark.parametrize("variant", ["parallel", "chained"])
@pytest.mark.parametrize("index", [0, 20, 37], ids=lambda index: f"bucket-{TABLE[index].ratio}")
def test_losses_and_gradients_are_those_of_the_formulas(variant, index) -> None:
    objective, batch = objective_of(variant), batch_of(index)
    losses = objective(batch, draw(0, 5, batch))["loss"]
    losses.mean().backward()
    state = {name: each.detach().clone() for name, each in objective.model.state_dict().items()}
    copies = {name: state[name].requires_grad_() for name in state if name.startswith("copies.")}
    expected = plain_losses(objective, batch, state)
    torch.testing.assert_close(losses, expected, atol=1e-9, rtol=1e-9)
    gradients = torch.autograd.grad(expected.mean(), list(copies.values()))
    for name, gradient in zip(copies, gradients, strict=True):
        actual = objective.model.get_parameter(name).grad
        assert actual is not None and bool(actual.any()), name
        torch.testing.assert_close(actual, gradient, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize("variant", ["parallel", "chained"])
def test_the_model_has_no_gradient_and_does_not_change(variant) -> None:
    objective = objective_of(variant, untrained=True).float()
    before = {name: each.clone() for name, each in objective.state_dict().items()}
    trained = [each for each in objective.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = batch_of(25, torch.float32)
    draws = draw(0, 0, batch)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = objective(batch, draws)["loss"].mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    for name, parameter in objective.named_parameters():
        mine = ".copies." in name
        assert (parameter.grad is not None) is mine, name
        assert torch.equal(parameter, before[name]) is not mine, name


def test_captions_may_be_projected_once() -> None:
    """The projection is frozen, so it need not run in every step."""
    objective, batch = objective_of("chained"), batch_of(3)
    draws = draw(1, 2, batch)
    with torch.no_grad():
        project = objective.model.y_proj
        ready = replace(batch, prompt_embeds=project(batch.prompt_embeds))
        nothing = replace(null(), embeds=project(null().embeds[None])[0])
    again = ControlNetObjective(
        objective.model, objective.diffusion, nothing, text_dropout=0.5, projected=True
    )
    torch.testing.assert_close(again(ready, draws), objective(batch, draws), atol=1e-9, rtol=1e-9)


def test_an_untrained_one_has_the_text_models_loss() -> None:
    objective, batch = objective_of("chained", untrained=True), batch_of(3)
    draws = draw(1, 2, batch)
    other = replace(batch, condition=torch.zeros_like(batch.latents))
    torch.testing.assert_close(objective(batch, draws), objective(other, draws), atol=0, rtol=0)


@pytest.mark.parametrize(("variant", "copies"), [("parallel", 3), ("parallel", 1), ("chained", 2)])
@pytest.mark.parametrize("full", [False, True], ids=["kept", "checkpointed"])
def test_flops_are_what_pytorch_counts(variant, copies, full) -> None:
    objective, batch = objective_of(variant, copies), batch_of(8)
    if full:
        for unit in objective.units:
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False)
    draws = draw(0, 0, batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(batch, draws)["loss"].sum().backward()
    expected = objective.flops(batch.bucket, full)
    assert counter.get_total_flops() == B * expected.hardware
    assert (expected.recomputed > 0) is full


@pytest.mark.parametrize("parallel", [Parallel.DDP, Parallel.FSDP])
def test_the_trainer_trains_the_copies_alone_and_goes_on(parallel, tmp_path) -> None:
    """Frozen parameters are in no checkpoint; the batches are of several buckets."""

    def feed(start: int, stop: int) -> Iterator[Batch]:
        yield from (batch_of((0, 20, 37)[step % 3], torch.float32) for step in range(start, stop))

    def run(steps: int) -> Trainer:
        settings = RunSettings(
            steps=steps, lr=LEARNING_RATE, precision=Precision.FP32, save_every=2, log_every=1,
            parallel=parallel, checkpointing=Checkpointing.SELECTIVE,
        )  # fmt: skip
        objective = objective_of("chained", untrained=True).float()
        with start_ranks("cpu") as ranks:
            trainer = Trainer(objective, feed, settings, tmp_path / "run", ranks)
            trainer.run()
        return trainer

    first = run(2)
    assert first.ema is not None
    assert all(".copies." in name for name in first.ema.averages)
    second = run(4)
    start = objective_of("chained", untrained=True).float().state_dict()
    for name, tensor in second.objective.state_dict().items():
        assert torch.equal(tensor, start[name]) is (".copies." not in name), name
    averages = second.weights(average=True)
    write_controlnet(trained(second.objective, averages, "a run"), tmp_path / "controlnet")
    found = read_controlnet(tmp_path / "controlnet", CONFIG)
    assert found.config == second.objective.model.controlnet
    for name, tensor in found.state.items():
        assert torch.equal(tensor, second.ema.averages[f"model.{name}"].float()), name
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_two_sharded_ranks_make_the_steps_of_one(tmp_path) -> None:
    """FSDP divides blocks and copies; equal losses and weights but for sums in another order."""
    found = []
    for num_ranks in (1, 2):
        out = tmp_path / str(num_ranks)
        out.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(num_ranks):
            told = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent.parent),
            }  # fmt: skip
            processes.append(
                subprocess.Popen([sys.executable, SCRIPT, out], env={**os.environ, **told})
            )
        assert [process.wait(timeout=240) for process in processes] == [0] * num_ranks
        losses = [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]
        by_step = [[loss for rank in losses for loss in rank[step]] for step in range(2)]
        found.append((by_step, torch.load(out / "weights.pt", weights_only=True)))
    (one, whole), (two, sharded) = found
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=1e-4, rtol=1e-4)
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        # Adam's first steps are of lr = 1e-3 each whatever the gradient; a hundredth of them
        torch.testing.assert_close(sharded[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_units_are_blocks_and_copies() -> None:
    objective = objective_of("parallel")
    assert list(objective.units) == [*objective.model.blocks, *objective.model.copies]
    inside = sum(each.numel() for unit in objective.units for each in unit.parameters())
    trained = sum(each.numel() for each in objective.parameters() if each.requires_grad)
    assert trained == sum(each.numel() for each in objective.model.copies.parameters())
    assert inside == trained + sum(each.numel() for each in objective.model.blocks.parameters())


def test_a_batch_without_control_images_is_refused() -> None:
    batch = replace(batch_of(0), condition=None)
    with pytest.raises(DataError, match="the data has no control images"):
        objective_of("chained")(batch, draw(0, 0, batch))


def test_the_condition_is_cut_and_moved_with_its_batch() -> None:
    batch = batch_of(0)
    part = batch.rows(1, 3)
    assert part.condition is not None and batch.condition is not None
    assert torch.equal(part.condition, batch.condition[1:3])
    moved = batch.to("meta").condition
    assert moved is not None and moved.is_meta
