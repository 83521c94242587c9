"""DreamBooth and LoRA on four drawn pictures and the tiny model, from folder to merged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_rt.checkpoints import lora
from pixart_rt.checkpoints.hub import TINY
from pixart_rt.checkpoints.transformer import load_transformer, read_transformer, write_diffusers
from pixart_rt.data.crop import bucket_table
from pixart_rt.data.encode import EncoderConfig, FeatureEncoder
from pixart_rt.data.instances import encode_instances, pictures_of
from pixart_rt.errors import ConfigError
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.lora import add_lora, lora_state, save_lora
from pixart_rt.training.finetune.settings import DREAMBOOTH, LORA, FinetuneSettings, LoraSettings
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.objectives.dreambooth import DreamBoothObjective
from pixart_rt.training.prior_pairs import PairedSampler
from pixart_rt.training.sample_rng import draw
from pixart_rt.training.sample_source import null_of
from pixart_rt.training.sampler import BucketSampler

TABLE = bucket_table(256, square=False)
TOKENS = [bucket.num_tokens for bucket in TABLE]


def draw_pictures(root, sizes, seed):
    """Coloured squares, which tiny, trained on shapes on plain ground, has never seen."""
    root.mkdir()
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.save(root / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Four instances in two shapes, three pictures of the class, and the empty prompt."""
    root = tmp_path_factory.mktemp("pictures")
    dog = draw_pictures(root / "dog", [(256, 256), (200, 400), (300, 300), (130, 256)], 0)
    animals = draw_pictures(root / "class", [(256, 256), (300, 280), (256, 250)], 1)
    encoder = FeatureEncoder.open(EncoderConfig(model="tiny"), torch.device("cpu"))
    source = encode_instances(
        encoder, TABLE, pictures_of(dog, "a photo of sks circle"),
        pictures_of(animals, "a photo of a circle"),
    )  # fmt: skip
    return source, null_of(read_transformer(TINY / "transformer_256"), encoder.text([""])[0][0])


def tiny():
    return load_transformer(read_transformer(TINY / "transformer_256"), torch.float32)


def paired(source):
    return PairedSampler(
        source.bucket_of, source.num_instances, TOKENS, token_budget=4 * max(TOKENS)
    )


def step_of(source, sampler, step, seed=0):
    batch = source.finish(source.load(sampler.ids(step).tolist(), seed=seed, step=step))
    return batch, draw(seed, step, batch)


def dreambooth(source, null, model, **settings):
    return DreamBoothObjective(
        model, GaussianDiffusion(), null, num_instances=source.num_instances, **settings
    )


@pytest.mark.parametrize("prior_weight", [1.0, 0.3, 0.0])
def test_the_loss_is_the_instances_mean_and_a_share_of_the_class(features, prior_weight):
    source, null = features
    batch, draws = step_of(source, paired(source), 0)
    model = tiny()
    with torch.no_grad():
        plain = TextObjective(model, GaussianDiffusion(), null, 0.0)(batch, draws)
        losses = dreambooth(source, null, model, prior_weight=prior_weight)(batch, draws)
    instances = batch.ids < source.num_instances
    assert instances.tolist() == [True, False, True, False]
    expected = plain["loss"][instances].mean() + prior_weight * plain["loss"][~instances].mean()
    torch.testing.assert_close(losses["loss"].mean(), expected)
    assert torch.equal(losses["mse"], plain["mse"]), "what is logged is not weighted"


def test_micro_batches_add_up(features):
    """Pairs split apart: a micro-batch of instances alone, and one of the class alone."""
    source, null = features
    batch, draws = step_of(source, paired(source), 1)
    gradients = []
    for parts in ([(0, 4)], [(0, 1), (1, 2), (2, 4)]):
        model = tiny()
        add_lora(model, LoraSettings(rank=2, alpha=2.0))
        objective = dreambooth(source, null, model, prior_weight=0.5)
        for start, stop in parts:
            losses = objective(batch.rows(start, stop), draws.rows(start, stop))
            (losses["loss"].sum() / len(batch)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-7)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0].values())


def test_cached_captions_give_the_loss_of_the_text_encoders(features):
    """Also of dropped captions; and the same gradients of what learns."""
    source, null = features
    found = []
    for cached in (False, True):
        model = tiny()
        model.y_proj.requires_grad_(False)
        ours, its_null = source, null
        if cached:
            ours = source.projected(model.y_proj)
            with torch.no_grad():
                its_null = NullText(model.y_proj(null.embeds[None].float())[0], null.mask)
        objective = dreambooth(ours, its_null, model, text_dropout=0.5, projected=cached)
        step = 3
        batch, draws = step_of(ours, paired(ours), step)
        dropped = draws.dropped(0.5)
        assert dropped.any()
        assert not dropped.all()
        losses = objective(batch, draws)
        losses["loss"].mean().backward()
        assert model.y_proj.fc1.weight.grad is None
        found.append((losses, model.blocks[0].cross_attn.kv_linear.weight.grad))
    for name in found[0][0]:
        torch.testing.assert_close(found[1][0][name], found[0][0][name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def test_a_projection_that_learns_cannot_be_cached(features):
    source, null = features
    with pytest.raises(ConfigError, match="freeze it"):
        dreambooth(source, null, tiny(), projected=True)


def test_without_class_pictures_it_is_the_text_objective(features):
    source, null = features
    batch, draws = step_of(source, paired(source), 0)
    model = tiny()
    with torch.no_grad():
        plain = TextObjective(model, GaussianDiffusion(), null, 0.0)(batch, draws)
        alone = DreamBoothObjective(model, GaussianDiffusion(), null)(batch, draws)
    assert torch.equal(plain["loss"], alone["loss"])
    with pytest.raises(ConfigError, match="prior_weight"):
        dreambooth(source, null, model, prior_weight=-1.0)


def test_work_that_is_left_out_is_not_counted(features):
    """Of a LoRA: no weight gradients of the base, and no caption projection where it is cached."""
    _, null = features
    model, bucket = tiny(), TABLE[20]
    counted = {"all": DreamBoothObjective(model, GaussianDiffusion(), null).flops(bucket, False)}
    add_lora(model, LoraSettings())
    for name, projected in (("lora", False), ("cached", True)):
        objective = DreamBoothObjective(model, GaussianDiffusion(), null, projected=projected)
        counted[name] = objective.flops(bucket, False)
    assert counted["lora"].forward > counted["all"].forward  # the adapters
    assert counted["lora"].backward < 0.7 * counted["all"].backward  # attention has no weights
    config = model.config
    D, E, T = config.hidden_size, config.caption_channels, config.max_text_tokens
    projection = 2 * T * (E * D + D * D)
    assert counted["lora"].forward - counted["cached"].forward == projection


def train(objective, source, sampler, steps, lr):
    """A plain loop; returns the loss of a fixed batch before and after."""
    learning = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr)
    fixed = step_of(source, sampler, 0, seed=9)
    before = fixed_loss(objective, fixed)
    for step in range(steps):
        objective(*step_of(source, sampler, step))["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, fixed_loss(objective, fixed), fixed


@torch.no_grad()
def fixed_loss(objective, fixed):
    return float(objective(*fixed)["loss"].mean())


def test_a_lora_from_pictures_to_merged_weights(features, tmp_path):
    source, null = features
    model, settings = tiny(), LoraSettings(rank=4, alpha=4.0)
    add_lora(model, settings)
    cached = source.projected(model.y_proj)
    with torch.no_grad():
        projected = NullText(model.y_proj(null.embeds[None].float())[0], null.mask)
    objective = dreambooth(cached, projected, model, projected=True)
    before, after, fixed = train(objective, cached, paired(cached), steps=12, lr=1e-3)
    assert after < 0.8 * before
    save_lora(tmp_path / "lora", lora_state(model), settings)
    base = read_transformer(TINY / "transformer_256")
    merged = lora.merge(base, lora.read_adapter(tmp_path / "lora"))
    write_diffusers(merged, tmp_path / "merged")
    again = load_transformer(read_transformer(tmp_path / "merged"))
    again.requires_grad_(False)
    with_merged = fixed_loss(dreambooth(cached, projected, again, projected=True), fixed)
    assert with_merged == pytest.approx(after, rel=1e-5)


def test_all_weights_learn_from_pictures_alone(features):
    source, null = features
    model = tiny()
    objective = DreamBoothObjective(model, GaussianDiffusion(), null)
    sampler = BucketSampler(
        source.bucket_of[: source.num_instances], TOKENS, token_budget=2 * max(TOKENS)
    )
    before, after, _ = train(objective, source, sampler, steps=10, lr=3e-4)
    assert after < 0.8 * before


def test_the_presets_are_the_papers():
    assert (DREAMBOOTH.lr, DREAMBOOTH.steps, DREAMBOOTH.batch) == (5e-6, 300, 1)
    assert (DREAMBOOTH.prior_weight, DREAMBOOTH.text_dropout) == (1.0, 0.0)
    assert not LORA.train_captions
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"prior_weight": -0.1}, {"text_dropout": 1.5}):
        with pytest.raises(ConfigError):
            FinetuneSettings(**wrong)
