"""A student of a small real transformer: it learns, is saved, and is sampled as an LCM."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from pixart_rt import PixArtPipeline
from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.transformer import (
    TransformerCheckpoint,
    load_transformer,
    read_transformer,
    write_diffusers,
)
from pixart_rt.config import EngineConfig
from pixart_rt.data.batch import Batch
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.export.build import build
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.lcm_pipeline import use_lcm_scheduler
from pixart_rt.training.objectives.denoising import Positions, predict_noise
from pixart_rt.training.objectives.lcm import ConsistencyDistillation
from pixart_rt.training.sample_rng import draw

pytestmark = pytest.mark.usefixtures("no_kernels")
PROMPT = "a red circle above a blue square"
STEPS = 12


@pytest.fixture(scope="module")
def teacher(pipeline_folder) -> TransformerCheckpoint:
    return read_transformer(pipeline_folder(32))


def make_batch(config) -> Batch:
    random = torch.Generator().manual_seed(1)
    bucket = Bucket(ratio=0.6, height=48, width=80)
    T = config.max_text_tokens
    return Batch(
        ids=torch.tensor([3, 141, 59, 26]),
        latents=torch.randn(4, 4, 6, 10, generator=random),
        prompt_embeds=torch.randn(4, T, config.caption_channels, generator=random).bfloat16(),
        prompt_mask=torch.arange(T)[None] < torch.tensor([2, 5, 9, 1])[:, None],
        original_size=torch.tensor([[48.0, 80.0]]).expand(4, 2),
        aspect_ratio=torch.full((4, 1), 0.6),
        bucket=bucket,
    )


def distil(checkpoint: TransformerCheckpoint):
    """The objective after a few steps on one batch, and its loss before each of them."""
    config = checkpoint.config
    random = torch.Generator().manual_seed(2)
    null = NullText(
        torch.randn(config.max_text_tokens, config.caption_channels, generator=random),
        torch.arange(config.max_text_tokens) < 1,
    )
    student = deepcopy(load_transformer(checkpoint, torch.float32))  # the checkpoint stays as it is
    objective = ConsistencyDistillation(student, GaussianDiffusion(), null)
    batch = make_batch(config)
    draws = draw(5, 0, batch)
    trained = [each for each in objective.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = objective(batch, draws)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(torch.zeros(()))
        losses.append(loss.item())
    return objective, losses


@pytest.fixture(scope="module")
def distilled(teacher):
    return distil(teacher)


def test_a_few_steps_on_one_batch_lower_the_loss(teacher, distilled):
    objective, losses = distilled
    assert losses[-1] < 0.6 * losses[0]  # 2.09 to 0.82
    given = teacher.state
    for name, value in objective.teacher.state_dict().items():
        assert torch.equal(value, given[name]), name
    trained, target = objective.model.state_dict(), objective.target.state_dict()
    for name in ("x_embedder.weight", "blocks.1.mlp.fc2.bias", "modulator.t_block.1.weight"):
        behind = (target[name] - given[name]).norm() / (trained[name] - given[name]).norm()
        assert 0.05 < behind < 0.95, name


def test_the_variance_rows_get_no_gradient(teacher, distilled):
    """Their weights in the last layer are the teacher's, as the preset decays no weights."""
    rows = distilled[0].model.final_layer.linear
    # An output token is its 2x2 pixels, each with 8 channels of which 4 are noise.
    variance = torch.arange(32) % 8 >= 4
    before = teacher.state["final_layer.linear.weight"]
    assert torch.equal(rows.weight[variance], before[variance])
    assert not torch.equal(rows.weight[~variance], before[~variance])


@pytest.fixture(scope="module")
def student_folder(teacher, distilled, pipeline_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "lcm"
    shutil.copytree(pipeline_folder(32), folder, ignore=shutil.ignore_patterns("transformer"))
    state = {name: each.detach() for name, each in distilled[0].model.state_dict().items()}
    student = TransformerCheckpoint(teacher.config, state, teacher.y_embedding, "a student")
    write_diffusers(student, folder / "transformer")
    use_lcm_scheduler(folder)
    return folder


def test_a_saved_student_is_sampled_as_an_lcm(student_folder, distilled, tmp_path):
    """The oracle is a loop over diffusers' LCMScheduler and the trained module, unguided."""
    from diffusers import LCMScheduler

    config = EngineConfig(resolution=256, backend="torch")
    bundle = build(str(student_folder), tmp_path / "b", config)
    assert bundle.manifest.scheduler == "lcm"
    pipe = PixArtPipeline.from_bundle(bundle.path, "cpu")
    model = distilled[0].model
    assert pipe.prompt_encoder is not None
    text = pipe.prompt_encoder([PROMPT])
    square = Bucket(ratio=1.0, height=256, width=256)
    one = Batch(
        ids=torch.tensor([0]), latents=torch.empty(1, 4, 32, 32), prompt_embeds=text.embeds,
        prompt_mask=text.mask, original_size=torch.tensor([[256.0, 256.0]]),
        aspect_ratio=torch.tensor([[1.0]]), bucket=square,
    )  # fmt: skip
    sampler = LCMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    sampler.set_timesteps(4)
    random = torch.Generator().manual_seed(21)
    x = torch.randn((1, 4, 32, 32), generator=random)
    for t in sampler.timesteps:
        with torch.no_grad():
            eps = predict_noise(
                model, Positions(model.config), x, t[None], text.embeds, text.mask, one
            )[:, :4]
        x = sampler.step(eps, t, x, generator=[random], return_dict=False)[0]

    steps: list[int] = []
    arguments = {"num_inference_steps": 4, "seed": 21, "output_type": "latent"}
    actual = pipe(
        PROMPT, **arguments,
        callback_on_step_end=lambda _p, _s, timestep, _v: steps.append(int(timestep)),
    ).images  # fmt: skip
    assert steps == sampler.timesteps.tolist() == [999, 759, 499, 259]
    torch.testing.assert_close(actual, x, atol=2e-3, rtol=2e-3)  # float32, as test_pipeline's
    assert torch.equal(pipe(PROMPT, guidance_scale=1.0, **arguments).images, actual)
    with pytest.raises(ConfigError, match="distilled into the model"):
        pipe(PROMPT, guidance_scale=4.5, **arguments)


def test_diffusers_reads_the_students_folder(student_folder, teacher):
    import diffusers

    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(student_folder)
    assert isinstance(pipeline.scheduler, diffusers.LCMScheduler)
    found = {key: pipeline.scheduler.config[key] for key in
             ("beta_start", "beta_end", "beta_schedule", "timestep_scaling")}  # fmt: skip
    assert list(found.values()) == [1e-4, 0.02, "linear", 10.0]
    files = [
        student_folder / "model_index.json",
        student_folder / "scheduler/scheduler_config.json",
    ]
    before = [json.loads(each.read_text()) for each in files]
    use_lcm_scheduler(student_folder)
    assert [json.loads(each.read_text()) for each in files] == before


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        use_lcm_scheduler(tmp_path)
    assert not list(tmp_path.iterdir())
