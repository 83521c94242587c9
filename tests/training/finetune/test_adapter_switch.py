"""LCM-LoRA on a small transformer with peft's own layers: the teacher is the model without them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.errors import ConfigError
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.torchao_import import quiet_imports
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.adapter_switch import adapter_off
from pixart_rt.training.objectives.lcm import LORA, ConsistencyDistillation, LcmSettings
from pixart_rt.training.sample_rng import draw

with quiet_imports():
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("no_kernels")
CONFIG = ModelConfig(
    num_layers=2, num_heads=1, caption_channels=5, max_text_tokens=4, sample_size=8,
    interpolation_scale=1.0,
)  # fmt: skip
NULL = NullText(torch.ones(4, 5), torch.arange(4) < 1)


@pytest.fixture
def base() -> PixArtTransformer:
    torch.manual_seed(0)
    return PixArtTransformer(CONFIG)


@pytest.fixture
def adapted(base) -> PixArtTransformer:
    """The same with adapters that are not zero."""
    model = deepcopy(base).requires_grad_(False)
    linears = ["attn.qkv", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1"]
    settings = peft.LoraConfig(r=3, lora_alpha=3, target_modules=linears, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    return model


@pytest.fixture
def batch() -> Batch:
    return Batch(
        ids=torch.arange(3),
        latents=torch.randn(3, 4, 6, 10),
        prompt_embeds=torch.randn(3, 4, 5),
        prompt_mask=torch.arange(4)[None] < torch.tensor([4, 1, 2])[:, None],
        original_size=torch.tensor([[48.0, 80.0]]).expand(3, 2),
        aspect_ratio=torch.full((3, 1), 0.6),
        bucket=Bucket(ratio=0.6, height=48, width=80),
    )


def test_the_base_is_the_teacher_and_only_the_adapter_learns(base, adapted, batch):
    shared = ConsistencyDistillation(
        adapted, GaussianDiffusion(), NULL, LORA, adapter_off=lambda: adapter_off(adapted)
    )
    apart = ConsistencyDistillation(
        deepcopy(adapted), GaussianDiffusion(), NULL, LcmSettings(target_decay=0.0), teacher=base
    )
    trained = [each for each in adapted.parameters() if each.requires_grad]
    assert len(trained) == 2 * 4 * CONFIG.num_layers
    start = [each.detach().clone() for each in trained]
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    draws = draw(1, 0, batch)
    losses = []
    for step in range(10):
        found = shared(batch, draws)["loss"]
        if step == 0:
            expected = apart(batch, draws)["loss"]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert all(each.requires_grad for each in trained)
        found.mean().backward()
        assert all(each.grad.isfinite().all() and each.grad.any() for each in trained)
        optimizer.step()
        optimizer.zero_grad()
        shared.after_step(torch.zeros(()))
        losses.append(found.mean().item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(a, b) for a, b in zip(trained, start, strict=True))
    for name, value in adapted.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]) and value.grad is None, name


def test_the_adapter_comes_back_after_an_error(base, adapted):
    x = torch.randn(2, 5, CONFIG.hidden_size)
    layer, plain = adapted.blocks[0].mlp.fc1, base.blocks[0].mlp.fc1
    before = layer(x)
    with pytest.raises(ZeroDivisionError), adapter_off(adapted):
        torch.testing.assert_close(layer(x), plain(x))
        _ = 1 / 0
    assert torch.equal(layer(x), before) and not torch.allclose(before, plain(x), atol=1e-3)


def test_a_model_without_adapters_is_refused(base):
    with pytest.raises(ConfigError, match="without any"), adapter_off(base):
        pass
