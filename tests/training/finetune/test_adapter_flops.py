"""FLOPs of objectives with adapters or several passes against what PyTorch counts in a step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.distributed import spread
from pixart_rt.training.dropout import NullText
from pixart_rt.training.finetune.adapter_switch import adapter_off
from pixart_rt.training.finetune.lora import add_lora
from pixart_rt.training.finetune.settings import LoraSettings, LoraTargets
from pixart_rt.training.flops import StepFlops
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.objectives.lcm import ConsistencyDistillation, LcmSettings
from pixart_rt.training.process_group import start_ranks
from pixart_rt.training.run_settings import Checkpointing, RunSettings
from pixart_rt.training.sample_rng import draw

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("no_kernels")
B, T, E, RANK = 3, 4, 5, 7
CONFIG = ModelConfig(
    num_layers=3, num_heads=1, caption_channels=E, max_text_tokens=T, sample_size=8,
    interpolation_scale=1.0,
)  # fmt: skip
NULL = NullText(torch.ones(T, E), torch.arange(T) < 1)
BUCKET = Bucket(ratio=0.6, height=48, width=80)


def batch(text_width: int = E) -> Batch:
    return Batch(
        ids=torch.arange(B),
        latents=torch.randn(B, 4, 6, 10),
        prompt_embeds=torch.randn(B, T, text_width),
        prompt_mask=torch.arange(T)[None] < torch.tensor([4, 1, 2])[:, None],
        original_size=torch.tensor([[48.0, 80.0]]).expand(B, 2),
        aspect_ratio=torch.full((B, 1), 0.6),
        bucket=BUCKET,
    )


def adapted(targets: LoraTargets) -> PixArtTransformer:
    torch.manual_seed(0)
    model = PixArtTransformer(CONFIG)
    add_lora(model, LoraSettings(rank=RANK, targets=targets))
    return model


def hardware(objective: TextObjective, full: bool, given: Batch) -> tuple[int, StepFlops]:
    """What PyTorch counts of a step on an image, and what is computed for it."""
    kind = Checkpointing.FULL if full else Checkpointing.NONE
    with start_ranks("cpu") as ranks:
        spread(objective, RunSettings(steps=1, lr=1.0, checkpointing=kind), ranks)
        draws = draw(0, 0, given)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            objective(given, draws)["loss"].mean().backward()
    counted, rest = divmod(counter.get_total_flops(), B)
    assert rest == 0
    return counted, objective.flops(BUCKET, full)


def spared(rank: int = RANK) -> int:
    """The gradient of the first query, key and value's input, through the linear and its A."""
    N, D = BUCKET.num_tokens, CONFIG.hidden_size
    return 2 * N * D * (3 * D + rank)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("targets", LoraTargets)
@pytest.mark.parametrize("projected", [False, True])
def test_a_lora(targets: LoraTargets, projected: bool, full: bool) -> None:
    width = CONFIG.hidden_size if projected else E
    null = NullText(torch.ones(T, width), NULL.mask)
    objective = TextObjective(adapted(targets), GaussianDiffusion(), null, projected=projected)
    counted, found = hardware(objective, full, batch(width))
    assert counted == found.hardware - spared()
    assert (found.recomputed > 0) == full


@pytest.mark.parametrize("full", [False, True])
def test_a_distillation_of_all_weights(full: bool) -> None:
    torch.manual_seed(0)
    objective = ConsistencyDistillation(PixArtTransformer(CONFIG), GaussianDiffusion(), NULL)
    counted, found = hardware(objective, full, batch())
    assert counted == found.hardware


@pytest.mark.parametrize("full", [False, True])
def test_a_distillation_of_adapters(full: bool) -> None:
    """The teacher's two passes are without them, the student's and its target's with them."""
    model = adapted(LoraTargets.ATTENTION)
    objective = ConsistencyDistillation(
        model, GaussianDiffusion(), NULL, LcmSettings(target_decay=0.0, lora_rank=RANK),
        adapter_off=lambda: adapter_off(model),
    )  # fmt: skip
    counted, found = hardware(objective, full, batch())
    assert counted == found.hardware - spared()
