"""What a ControlNet learns: the text model's noise, seeing the control image (paper, A.9).

The model stays as it is; its copies and the zero linears are trained, with the loss of the text
model (lr 5e-6 and 20,000 steps on HED edges in the paper). Buckets may be of any shape, as for the
text model: positions of the control image are those of the image.

B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pixart_rt.buckets import Bucket
from pixart_rt.checkpoints.controlnet import ControlNetCheckpoint
from pixart_rt.config import ModelConfig
from pixart_rt.data.batch import Batch
from pixart_rt.errors import DataError
from pixart_rt.model.controlnet import COPIES, ControlNetTransformer
from pixart_rt.model.controlnet_config import ControlNetConfig
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.flops import Part, Product, StepFlops, blocks, step_flops, text_model
from pixart_rt.training.objectives.denoising import TIMESTEPS, TextObjective, predict_noise
from pixart_rt.training.sample_rng import Draws

LEARNING_RATE = 5e-6  # the paper's; the released code's is 2e-5·√(batch / 256)


class ControlNetObjective(TextObjective):
    """TextObjective for a ControlNetTransformer, whose copies alone require gradients from here on.

    Gradients also pass through the frozen blocks, to the copies before them. (The original code of
    the parallel form runs frozen blocks without gradients, which cuts those off.) Captions are
    dropped as for the text model, the control image never is.
    """

    model: ControlNetTransformer

    def __init__(
        self,
        model: ControlNetTransformer,
        diffusion: GaussianDiffusion,
        null: NullText,
        text_dropout: float = 0.1,
        *,
        timestep_shift: float = 1.0,
        projected: bool = False,
    ) -> None:
        model.requires_grad_(False)
        model.copies.requires_grad_(True)
        super().__init__(
            model, diffusion, null, text_dropout, timestep_shift=timestep_shift, projected=projected
        )

    @property
    def units(self) -> Sequence[nn.Module]:
        return [*self.model.blocks, *self.model.copies]

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops:
        config = self.model.config
        return controlnet_flops(
            config,
            self.model.controlnet,
            bucket.num_tokens,
            config.max_text_tokens,
            full_checkpointing=full_checkpointing,
        )

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Raises DataError for a batch without control images."""
        if batch.condition is None:
            raise DataError(
                "a ControlNet was to be trained, but the data has no control images; read it "
                "through pixart_rt.data.control"
            )
        t = draws.timesteps(self.diffusion.num_timesteps, self.timestep_shift)
        noisy = self.diffusion.q_sample(batch.latents, t, draws.noise)
        embeds, mask = self.captions(batch, draws)
        output = predict_noise(
            self.model, self.positions, noisy, t, embeds, mask, batch,
            projected=self.projected, condition=batch.condition,
        )  # fmt: skip
        losses = self.diffusion.training_losses(output, batch.latents, t, draws.noise)
        return losses | {TIMESTEPS: t}


def trained(
    objective: ControlNetObjective, weights: Mapping[str, Tensor], source: str
) -> ControlNetCheckpoint:
    """What is written of `Trainer.weights`, raw or averaged: the copies (write_controlnet)."""
    model, prefix = objective.model, "model."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix + COPIES)
    }
    return ControlNetCheckpoint(model.controlnet, model.config, state, source)


def controlnet_flops(
    config: ModelConfig,
    controlnet: ControlNetConfig,
    num_tokens: int,
    text_tokens: int,
    *,
    full_checkpointing: bool = False,
) -> StepFlops:
    """Of a step on one image; what is counted is in flops.py.

    No gradient enters block 0: nothing that is trained comes before it. It passes through the
    frozen blocks after it, but not to their keys and values of the text, and the last layer; and
    through the copies, which also have weights'. Checkpointing stops before a copy's last product.
    """
    D, N, count = config.hidden_size, num_tokens, controlnet.num_copies
    model = text_model(config, N, text_tokens)
    embed = [each for each in model if each.part is Part.PATCHES]  # the control image
    final = [each for each in model if each.part is Part.FINAL]
    passing = [*blocks(config, config.num_layers - 1, N, text_tokens), *final]
    num_before = sum(controlnet.takes_control(index) for index in range(count))
    linear = 2 * N * D * D
    copies = [
        *blocks(config, count, N, text_tokens),
        Product(part=Part.BLOCKS, flops=num_before * linear, after=None),
        Product(part=Part.FINAL, flops=count * linear),  # never run again, as the last layer
    ]
    keys_values = 4 * N * text_tokens * D * (config.num_layers - 1)
    frozen = step_flops(passing, frozen=set(Part), full_checkpointing=full_checkpointing)
    trained = step_flops(copies, frozen={Part.CAPTIONS}, full_checkpointing=full_checkpointing)
    return StepFlops(
        forward=sum(each.flops for each in (*model, *embed)) + trained.forward,
        backward=frozen.backward - keys_values + trained.backward,
        recomputed=frozen.recomputed + trained.recomputed,
    )
