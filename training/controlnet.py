"""What a ControlNet learns: the text model's noise, seeing the control image (paper, A.9).

The model stays as it is; its copies and the zero linears are trained, with the loss of the text
model (lr 5e-6 and 20,000 steps on HED edges in the paper). Buckets may be of any shape, as for the
text model: positions of the control image are those of the image.

B images, C latent channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pixart_rt.batch import Batch
from pixart_rt.errors import DataError
from pixart_rt.model.controlnet import ControlNetTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.draws import Draws
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objective import TextObjective, predict_noise

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
    ) -> None:
        super().__init__(model, diffusion, null, text_dropout)
        model.requires_grad_(False)
        model.copies.requires_grad_(True)

    @property
    def units(self) -> Sequence[nn.Module]:
        return [*self.model.blocks, *self.model.copies]

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Raises DataError for a batch without control images."""
        if batch.condition is None:
            raise DataError(
                "a ControlNet was to be trained, but the data has no control images; read it "
                "through pixart_rt.data.control"
            )
        t = self.timesteps(draws)
        noisy = self.diffusion.q_sample(batch.latents, t, draws.noise)
        embeds, mask = self.captions(batch, draws)
        output = predict_noise(
            self.model, self.positions, noisy, t, embeds, mask, batch, condition=batch.condition
        )
        return self.diffusion.training_losses(output, batch.latents, t, draws.noise)
