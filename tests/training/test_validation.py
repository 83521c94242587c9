"""Validation images against the eager pipeline's, and what drawing them must leave alone."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_rt.approximations import StepCache
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer
from pixart_rt.config import CfgNull, EngineConfig, SamplingConfig, Scheduler
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.export.build import build
from pixart_rt.inference.images import contact_sheet, read_metadata
from pixart_rt.inference.pipeline import PixArtPipeline
from pixart_rt.model import text_encoder
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.optim.ema import Ema
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.trainer import Trainer
from pixart_rt.training.validation import Validation, ValidationSettings

CPU = torch.device("cpu")
PROMPTS = ("a red circle above a blue square", "three green stars in a row")
# Both in float32, but sums in another order: the pipeline runs two halves of guidance in one batch
# and the solver on tokens. An 8-bit value may round to its neighbour.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def references():
    """Plain PyTorch, as on any CPU outside the tests, where Triton is interpreted."""
    from pixart_rt.kernels import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "interpreting", lambda: False)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "b"
    return build("tiny", folder, EngineConfig(resolution=256, backend="torch", max_batch=2)).path


@pytest.fixture
def tiny():
    return load_transformer(read_transformer(TINY / "transformer_256"), torch.float32).train()


EXPLICIT = {"guidance_scale": SamplingConfig().guidance_scale}  # tiny's bundle has its own


def settings(steps=3, **changes):
    sampling = changes.pop("sampling", SamplingConfig(num_inference_steps=steps))
    return ValidationSettings(**{"prompts": PROMPTS, "seed": 7, "sampling": sampling, **changes})


@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({"batch": 1}, {}),
        ({"aspect_ratio": "3:2"}, {"aspect_ratio": "3:2"}),
        (
            {"sampling": SamplingConfig(num_inference_steps=2, guidance_scale=1.0)},
            {"num_inference_steps": 2, "guidance_scale": 1.0},
        ),
        (
            {"sampling": SamplingConfig(num_inference_steps=3, guidance_interval=(0.25, 0.6))},
            {"guidance_interval": (0.25, 0.6)},
        ),
        (
            {"sampling": SamplingConfig(num_inference_steps=2, scheduler=Scheduler.IDDPM)},
            {"num_inference_steps": 2, "scheduler": "iddpm"},
        ),
    ],
)
def test_images_are_the_pipelines(bundle, tiny, changes, call):
    pipe = PixArtPipeline.from_bundle(bundle)
    expected = pipe(
        list(PROMPTS), seed=7, output_type="pt", **{**EXPLICIT, "num_inference_steps": 3, **call}
    ).images
    actual = Validation("tiny", tiny.config, settings(**changes), CPU).images(tiny)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected.float().cpu(), rtol=0, atol=TOLERANCE)
    others = actual.roll(1, dims=0)
    assert (actual - others).abs().mean() > 10 * TOLERANCE, "the images must differ to tell"


def test_the_grid_is_of_these_images(bundle, tiny, tmp_path):
    pipe = PixArtPipeline.from_bundle(bundle)
    images = pipe(list(PROMPTS), seed=7, num_inference_steps=3, **EXPLICIT).images
    expected = np.asarray(contact_sheet(images, PROMPTS, columns=1), np.int16)
    validation = Validation("tiny", tiny.config, settings(columns=1), CPU)
    path = validation(tiny, tmp_path, 1200)
    assert path == tmp_path / "validation" / "step-1200.png"
    drawn = np.asarray(Image.open(path), np.int16)
    assert drawn.shape == expected.shape
    assert np.abs(drawn - expected).max() <= 1  # a value that rounds to its neighbour
    stored = read_metadata(path)
    assert json.loads(stored["prompts"]) == list(PROMPTS)
    assert (stored["step"], stored["seed"]) == ("1200", "7")
    assert validation(tiny, tmp_path, 1200) == path, "the same step is drawn again after a resume"


@pytest.mark.parametrize("convention", list(CfgNull))
def test_every_convention_of_the_null(bundle, tiny, convention):
    """The pipeline's own is the oracle; the conventions must differ to tell."""
    y_embedding = torch.randn(120, 128, generator=torch.Generator().manual_seed(3))
    config = replace(tiny.config, cfg_null=convention)
    pipe = PixArtPipeline.from_bundle(bundle)
    pipe.request_text.config, pipe.request_text._y_embedding = config, y_embedding
    expected = pipe(
        [PROMPTS[0]], seed=7, num_inference_steps=2, output_type="pt", **EXPLICIT
    ).images
    asked = settings(2, prompts=PROMPTS[:1])
    actual = Validation("tiny", config, asked, CPU, y_embedding=y_embedding).images(tiny)
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=TOLERANCE)
    if convention is not CfgNull.EMPTY_PROMPT:
        other = Validation("tiny", tiny.config, asked, CPU).images(tiny)
        assert (actual - other).abs().max() > 10 * TOLERANCE


def test_the_average_is_drawn_and_training_goes_on(tiny):
    """Other weights give other images; mode, weights, gradients and random numbers stay."""
    validation = Validation("tiny", tiny.config, settings(1, prompts=PROMPTS[:1]), CPU)
    ema = Ema(tiny)
    before = validation.images(tiny)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(1.1)
    kept = {name: each.clone() for name, each in tiny.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ema.applied(tiny):
        averaged = validation.images(tiny)
    assert torch.equal(averaged, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny.training and all(each.requires_grad for each in tiny.parameters())
    assert all(torch.equal(each, kept[name]) for name, each in tiny.state_dict().items())
    assert not torch.equal(validation.images(tiny), before)
    assert not tiny.eval().training and torch.equal(
        validation.images(tiny), validation.images(tiny)
    )
    assert not tiny.training


def test_a_run_draws_its_averages(tmp_path):
    """The trainer's weights, at the steps that were requested, on the steps' own numbers."""
    spec = importlib.util.spec_from_file_location(
        "small_run", Path(__file__).with_name("small_run.py")
    )
    small_run = sys.modules["small_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small_run)
    config = replace(small_run.MODEL, caption_channels=128, max_text_tokens=8)
    validation = Validation("tiny", config, settings(1, prompts=PROMPTS[:1]), CPU)
    model = PixArtTransformer(config)
    null = NullText(torch.zeros(8, 128), torch.arange(8) < 1)
    objective = TextObjective(model, GaussianDiffusion(), null)
    drawn = []

    def validate(weights, step):
        drawn.append(validation.of_weights(weights, tmp_path, step))
        averages = {name: each.clone() for name, each in trainer.ema.averages.items()}
        assert all(torch.equal(weights[name], each) for name, each in averages.items())

    class Feed:
        def __call__(self, start, stop):
            for step in range(start, stop):
                batch = small_run.MadeUpFeed(small_run.make_sampler(), ranks).batch(step)
                text = torch.zeros(len(batch), 8, 128, dtype=torch.bfloat16)
                yield replace(batch, prompt_embeds=text, prompt_mask=torch.ones(len(batch), 8) > 0)

    with start_ranks("cpu") as ranks:
        run_settings = small_run.make_settings(4, validate_every=2)
        trainer = Trainer(objective, Feed(), run_settings, tmp_path, ranks, validation=validate)
        trainer.run()
        with trainer.ema.applied(objective):
            again = validation(model, tmp_path / "again", 4)
    assert [path.name for path in drawn] == ["step-2.png", "step-4.png"]
    assert drawn[1].read_bytes() == again.read_bytes() != drawn[0].read_bytes()


def test_compiled_blocks_are_not_compiled_again(tiny):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    validation = Validation("tiny", tiny.config, settings(1, prompts=PROMPTS[:1]), CPU)
    expected = validation.images(tiny)
    for block in tiny.blocks:
        block.compile(backend=backend)
    assert torch.equal(validation.images(tiny), expected)
    assert compilations == []


def test_the_text_encoder_is_let_go(tiny, monkeypatch):
    made = []
    real = text_encoder.T5Encoder.__init__

    def init(self, *arguments, **settings):
        made.append(weakref.ref(self))
        real(self, *arguments, **settings)

    monkeypatch.setattr(text_encoder.T5Encoder, "__init__", init)
    validation = Validation("tiny", tiny.config, settings(), CPU)
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    assert len(validation.settings.prompts) == 2


def test_autocast_is_close(tiny):
    """bfloat16 products, as in training: eight bits a value, so the mean error is below one of
    their steps. Of eight steps the later ones mend what the first rounded; one from noise would
    show it 1 / sqrt(alpha_999) = 157 times; four still show it, more or less by the weights."""
    asked = settings(8, prompts=PROMPTS[:1])
    exact = Validation("tiny", tiny.config, asked, CPU).images(tiny)
    rounded = Validation("tiny", tiny.config, asked, CPU, autocast=torch.bfloat16).images(tiny)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().mean() < 2**-8


def test_images_that_are_not_finite_are_said_to_be(tiny, tmp_path):
    with torch.no_grad():
        tiny.final_layer.linear.bias.fill_(torch.nan)
    validation = Validation("tiny", tiny.config, settings(1, prompts=PROMPTS[:1]), CPU)
    path = validation(tiny, tmp_path, 3)
    broken = np.asarray(Image.open(path))
    grey = Image.new("RGB", (256, 256))
    expected = contact_sheet([grey], [f"{PROMPTS[0]} (not finite)"])
    np.testing.assert_array_equal(broken, np.asarray(expected))


def test_what_cannot_be_is_said(tiny, tmp_path):
    with pytest.raises(ConfigError, match="without a prompt"):
        ValidationSettings(prompts=())
    with pytest.raises(ConfigError, match="validation got batch 0"):
        settings(batch=0)
    with pytest.raises(ConfigError, match="its images are those of all steps"):
        settings(sampling=SamplingConfig(approximate=StepCache(0.1)))
    with pytest.raises(CheckpointError, match="has no vae, text_encoder, tokenizer"):
        Validation(str(tmp_path), tiny.config, settings(), CPU)
    with pytest.raises(CheckpointError, match="is 128 wide, the model takes 64"):
        Validation("tiny", replace(tiny.config, caption_channels=64), settings(), CPU)
    with pytest.raises(ConfigError, match="learns no variance"):
        Validation("tiny", replace(tiny.config, out_channels=4),
                   settings(sampling=SamplingConfig(scheduler=Scheduler.IDDPM)), CPU)  # fmt: skip
