"""DreamBooth: a subject bound to a word, from a few pictures of it (paper, Section A.9).

    loss = mean over instances + prior_weight · mean over pictures of the class

(Ruiz et al., arXiv:2208.12242, Equation 2; the paper trains without the second term.) As weights of
samples, for batches of which half are instances: 2 and 2 · prior_weight. They depend on the sample
alone, so micro-batches of any make-up add up to the whole batch.

B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixart_rt.data.batch import Batch
from pixart_rt.errors import ConfigError
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText
from pixart_rt.training.objectives.denoising import TextObjective
from pixart_rt.training.sample_rng import Draws


class DreamBoothObjective(TextObjective):
    """The text objective, with prior preservation where there are pictures of the class.

    Ids below `num_instances` are instances and the others of the class; None: all are instances,
    and the loss is TextObjective's. Captions are not dropped by default: the original code leaves
    its 0.1 on, but the instances' one prompt teaches nothing about images without text.
    """

    def __init__(
        self,
        model: PixArtTransformer,
        diffusion: GaussianDiffusion,
        null: NullText,
        *,
        num_instances: int | None = None,
        prior_weight: float = 1.0,
        text_dropout: float = 0.0,
        projected: bool = False,
    ) -> None:
        super().__init__(model, diffusion, null, text_dropout, projected=projected)
        if prior_weight < 0:
            raise ConfigError(f"prior_weight must be >= 0, got {prior_weight}")
        self.num_instances, self.prior_weight = num_instances, prior_weight

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """As TextObjective; "loss" is weighted, its terms are not."""
        losses = super().forward(batch, draws)
        if self.num_instances is None:
            return losses
        of_class = batch.ids >= self.num_instances
        weights = 2 * torch.where(of_class, self.prior_weight, 1.0).to(losses["loss"])
        return losses | {"loss": weights * losses["loss"]}
