"""adaLN against adaLN-single without training: parameters, and the memory of a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from examples.ablation.adaln import AdaLNTransformer
from pixart_rt.config import XL_2_256, ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.memory.measure import peak_bytes
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.objectives.denoising import Positions, predict_noise
from pixart_rt.training.sample_rng import draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one kind of modulation."""

    parameters: int
    parameters_xl: int  # at the paper's size, XL/2
    peak_bytes: int  # of a training step: weights, gradients, AdamW's moments, activations


def cost(kind: type[nn.Module], config: ModelConfig, batch: Batch) -> Cost:
    """What a text model of this kind costs, float32, its step on `batch` measured on the CPU."""
    return Cost(
        parameters=_count(kind, config),
        parameters_xl=_count(kind, XL_2_256),
        peak_bytes=peak_bytes(_training_step(kind, config, batch)),
    )


def costs(config: ModelConfig, batch: Batch) -> dict[str, Cost]:
    return {
        "adaln": cost(AdaLNTransformer, config, batch),
        "adaln_single": cost(PixArtTransformer, config, batch),
    }


def _count(kind: type[nn.Module], config: ModelConfig) -> int:
    with torch.device("meta"):
        model = kind(config)
    return sum(each.numel() for each in model.parameters())


def _training_step(kind: type[nn.Module], config: ModelConfig, batch: Batch) -> Callable[[], Any]:
    def step() -> Any:
        model = cast(PixArtTransformer, kind(config))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        draws = draw(0, 0, batch)
        output = predict_noise(
            model, Positions(config), draws.noise, draws.timesteps(1000),
            batch.prompt_embeds, batch.prompt_mask, batch,
        )  # fmt: skip
        output.square().mean().backward()
        optimizer.step()
        return model, optimizer, output

    return step
