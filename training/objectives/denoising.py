"""What a step minimises: an objective is a module whose forward gives the losses of a batch.

    losses = objective(batch, draws)         {"loss": [B], and the terms it is made of, each [B];
    losses["loss"].mean().backward()          "timesteps": [B], those that it trained at}

It holds what is trained (parameters that require a gradient) and what is not. `units` are the
modules that are compiled, sharded (FSDP) and checkpointed one by one: the transformer's blocks.

B images, C latent channels, N tokens, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pixart_rt.buckets import Bucket
from pixart_rt.config import ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.errors import ConfigError, DataError
from pixart_rt.model.dit import DiT
from pixart_rt.model.embeddings import patchify, position_table, unpatchify
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText, drop_captions, drop_labels
from pixart_rt.training.flops import Part, StepFlops, adapters, dit, step_flops, text_model
from pixart_rt.training.sample_rng import Draws

TIMESTEPS = "timesteps"  # next to the losses: a meter sorts them by these


class Objective(nn.Module):
    """Base of all objectives."""

    @property
    def units(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        raise NotImplementedError

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops | None:
        """Of a step on one image; None where nobody has counted them."""
        return None

    def after_step(self, found_inf: Tensor) -> None:
        """Called after every step of the optimiser, for what follows the weights.

        Where `found_inf` [] is 1, on the device, the step was not finite and must change nothing.
        """

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides parameters and averages."""
        return {}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `own_state` gave."""


class Positions:
    """Position tables [1, N, D] float32 by bucket and device, each computed once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._tables: dict[tuple[Bucket, torch.device], Tensor] = {}

    def __call__(self, bucket: Bucket, device: torch.device) -> Tensor:
        key = bucket, device
        if key not in self._tables:
            self._tables[key] = position_table(self.config, bucket.grid).to(device)
        return self._tables[key]


def predict_noise(
    model: PixArtTransformer,
    positions: Positions,
    latents: Tensor,
    t: Tensor,
    prompt_embeds: Tensor,
    prompt_mask: Tensor,
    batch: Batch,
    *,
    projected: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """The text model on noisy latents [B, C, h, w] at timesteps t [B]: [B, 2C, h, w].

    With `projected` the embeddings have been through the caption projection already. Positions,
    sizes and aspect ratios are the batch's. Modulation is computed in float32 also under autocast,
    as it is when images are made. A `condition` [B, C, h, w], of a ControlNet, is patchified as the
    latents are.
    """
    config, bucket = model.config, batch.bucket
    with torch.autocast(latents.device.type, enabled=False):
        modulation = model.modulator(t.float(), batch.original_size, batch.aspect_ratio.flatten())
    more: dict[str, Any] = {"projected": True} if projected else {}
    if condition is not None:
        more["control"] = patchify(condition, config.patch_size)
    tokens = model(
        patchify(latents, config.patch_size),
        positions(bucket, latents.device),
        modulation,
        prompt_embeds,
        prompt_mask,
        **more,
    )
    return unpatchify(tokens, bucket.grid, config.patch_size)


def frozen_parts(model: PixArtTransformer) -> set[Part]:
    """The parts whose own weights get no gradients; adapters in them may."""
    modules = {
        Part.PATCHES: model.x_embedder, Part.CAPTIONS: model.y_proj, Part.TIMESTEP: model.modulator,
        Part.BLOCKS: model.blocks, Part.FINAL: model.final_layer,
    }  # fmt: skip
    return {
        part
        for part, module in modules.items()
        if not any(
            each.requires_grad for name, each in module.named_parameters() if ".lora_" not in name
        )
    }


def lora_pairs(model: PixArtTransformer) -> list[tuple[str, int, int, int]]:
    """Adapters in a model: the linear's name in its block, inputs, rank and outputs of each."""
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    pairs = []
    for name, (rank, inputs) in ((n, s) for n, s in shapes.items() if ".lora_A." in n):
        outputs = shapes[name.replace(".lora_A.", ".lora_B.")][0]
        linear = name.split(".lora_A.")[0].split(".", 2)[2]  # after blocks.<number>.
        pairs.append((linear, inputs, rank, outputs))
    return pairs


class TextObjective(Objective):
    """Noise and variance from a caption: the paper's stages 2 and 3 (Section 2.2).

    `null` is what dropped captions become; its tensors are moved with the module. With `projected`
    the batches' captions and the null have been through the model's caption projection, which must
    be frozen then, else ConfigError: it would learn nothing.
    """

    def __init__(
        self,
        model: PixArtTransformer,
        diffusion: GaussianDiffusion,
        null: NullText,
        text_dropout: float = 0.1,
        *,
        timestep_shift: float = 1.0,
        projected: bool = False,
    ) -> None:
        super().__init__()
        if projected and any(each.requires_grad for each in model.y_proj.parameters()):
            raise ConfigError(
                "projected captions were given to a model whose caption projection is trained; "
                "freeze it (model.y_proj), or give it the text encoder's captions"
            )
        self.model, self.diffusion, self.text_dropout = model, diffusion, text_dropout
        self.timestep_shift, self.projected = timestep_shift, projected
        self.positions = Positions(model.config)
        self.register_buffer("null_embeds", null.embeds, persistent=False)
        self.register_buffer("null_mask", null.mask, persistent=False)

    @property
    def units(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    def captions(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B, T, E] and their mask [B, T], some of them dropped."""
        null = NullText(self.get_buffer("null_embeds"), self._buffers["null_mask"])
        dropped = draws.dropped(self.text_dropout)
        return drop_captions(batch.prompt_embeds, batch.prompt_mask, dropped, null)

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops:
        config = self.model.config
        shape = bucket.num_tokens, config.max_text_tokens
        products = [*text_model(config, *shape), *adapters(lora_pairs(self.model), *shape)]
        if self.projected:
            products = [each for each in products if each.part is not Part.CAPTIONS]
        frozen = frozen_parts(self.model)
        return step_flops(products, frozen=frozen, full_checkpointing=full_checkpointing)

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        t = draws.timesteps(self.diffusion.num_timesteps, self.timestep_shift)
        noisy = self.diffusion.q_sample(batch.latents, t, draws.noise)
        output = predict_noise(
            self.model, self.positions, noisy, t, *self.captions(batch, draws), batch,
            projected=self.projected,
        )  # fmt: skip
        losses = self.diffusion.training_losses(output, batch.latents, t, draws.noise)
        return losses | {TIMESTEPS: t}


class ClassObjective(Objective):
    """Noise and variance from a class: the paper's stage 1, pixel dependency (Section 2.2)."""

    def __init__(
        self,
        model: DiT,
        diffusion: GaussianDiffusion,
        label_dropout: float = 0.1,
        *,
        timestep_shift: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.diffusion, self.label_dropout = model, diffusion, label_dropout
        self.timestep_shift = timestep_shift
        self.positions = Positions(model.config.backbone())

    @property
    def units(self) -> Sequence[nn.Module]:
        return list(self.model.blocks)

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops:
        products = dit(self.model.config, bucket.num_tokens)
        return step_flops(products, full_checkpointing=full_checkpointing)

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Raises DataError for a batch without labels."""
        if batch.labels is None:
            raise DataError(
                "a class-conditional phase was requested, but the data has no labels; extract a "
                "folder with a subfolder for each class"
            )
        t = draws.timesteps(self.diffusion.num_timesteps, self.timestep_shift)
        noisy = self.diffusion.q_sample(batch.latents, t, draws.noise)
        config = self.model.config
        labels = drop_labels(batch.labels, draws.dropped(self.label_dropout), config.null_label)
        tokens = self.model(
            patchify(noisy, config.patch_size),
            self.positions(batch.bucket, noisy.device),
            t,
            labels,
        )
        output = unpatchify(tokens, batch.bucket.grid, config.patch_size)
        losses = self.diffusion.training_losses(output, batch.latents, t, draws.noise)
        return losses | {TIMESTEPS: t}
