"""Latent consistency distillation: a student that needs 1 to 8 steps and no guidance
(arXiv:2310.04378; of PixArt-alpha in "PixArt-delta", arXiv:2401.05252).

    z_t    = sqrt(a_t) x_0 + sqrt(1 - a_t) noise
    e      = e_T(z_t, text) + w (e_T(z_t, text) - e_T(z_t, null))             the teacher T, guided
    z^_s   = sqrt(a_s) (z_t - sqrt(1 - a_t) e) / sqrt(a_t) + sqrt(1 - a_s) e     one DDIM step
    f(z,t) = c_skip(t) z + c_out(t) (z - sqrt(1 - a_t) e(z, t, text)) / sqrt(a_t)
    loss   = mean of sqrt(d^2 + h^2) - h,    d = f_student(z_t, t) - f_target(z^_s, s)

    c_skip = 0.25 / ((10 t)^2 + 0.25),    c_out = 10 t / sqrt((10 t)^2 + 0.25)

so that f(z, 0) = z; the loss is pseudo-Huber of each value, h = huber_c. t is t_{n+k} of the paper,
one of the 50 DDIM timesteps k i - 1 with k = 1000 / 50; s is t_n, k earlier, and 0 for the first.
The target is a moving average of the student.

w is one number for all samples. The paper's students take w as an input; PixArt has no place for
one, and its code distils at w = 4.5 alone. (It draws no w from the w_min to w_max that its
configuration lists.) A w drawn for each sample without telling the student would only teach it a
mean of what the different w ask for.

The variance half of the output is in no term: it gets no gradient of its own, and goes stale as the
weights before it change. A student is for the LCM sampler, which does not read it.

B samples, C channels, h×w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pixart_rt.buckets import Bucket
from pixart_rt.config import MOST_STEPS, Scheduler
from pixart_rt.data.batch import Batch
from pixart_rt.errors import ConfigError
from pixart_rt.model.transformer import PixArtTransformer, local
from pixart_rt.training.diffusion import GaussianDiffusion
from pixart_rt.training.dropout import NullText, drop_captions
from pixart_rt.training.finetune.settings import LCM_GUIDANCE
from pixart_rt.training.flops import StepFlops, text_model
from pixart_rt.training.objectives.denoising import TIMESTEPS, TextObjective, predict_noise
from pixart_rt.training.sample_rng import Draws

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # those of the LCM sampler; no other pair can be sampled
SAMPLED_STEPS = MOST_STEPS[Scheduler.LCM]  # the sampler's timesteps are among these many


@dataclass(frozen=True, kw_only=True, slots=True)
class LcmSettings:
    """What is distilled. The defaults are those of PixArt-alpha's code."""

    guidance_w: float = LCM_GUIDANCE
    """(1 + w) eps(c) - w eps(null): what a guidance_scale of 1 + w samples."""
    num_ddim_timesteps: int = 50
    huber_c: float = 0.001
    target_decay: float = 0.95
    """Of the target's moving average; with 0 the target is the student itself, and no copy."""
    lora_rank: int | None = None
    """LCM-LoRA (arXiv:2311.05556): an adapter of this rank is trained; None trains all weights."""

    def __post_init__(self) -> None:
        if not self.guidance_w >= 0:
            raise ConfigError(f"guidance_w must be >= 0, got {self.guidance_w}; PixArt-LCM has 4.5")
        if self.num_ddim_timesteps < 1 or self.num_ddim_timesteps % SAMPLED_STEPS:
            raise ConfigError(
                f"num_ddim_timesteps must be a multiple of {SAMPLED_STEPS}, got "
                f"{self.num_ddim_timesteps}; the LCM sampler would ask for untrained timesteps"
            )
        if not self.huber_c > 0:
            raise ConfigError(f"huber_c must be > 0, got {self.huber_c}; PixArt-LCM has 0.001")
        if not 0 <= self.target_decay < 1:
            raise ConfigError(f"target_decay must be in [0, 1), got {self.target_decay}")
        if self.lora_rank is None:
            return
        if self.lora_rank < 1:
            raise ConfigError(f"lora_rank must be positive, got {self.lora_rank}")
        if self.target_decay:
            raise ConfigError(
                f"target_decay {self.target_decay} is not supported with lora_rank "
                f"{self.lora_rank}; the target of an LCM-LoRA is the student itself: set "
                "target_decay to 0"
            )


FULL = LcmSettings()
LORA = LcmSettings(target_decay=0.0, lora_rank=32)


class ConsistencyDistillation(TextObjective):
    """The loss above. `model` is the student; `teacher` and `target` are None where they are it.

    Captions are never dropped: a student is not guided.
    """

    def __init__(
        self,
        student: PixArtTransformer,
        diffusion: GaussianDiffusion,
        null: NullText,
        settings: LcmSettings = FULL,
        *,
        teacher: PixArtTransformer | None = None,
        adapter_off: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        """teacher: any module called like the student; by default a copy of it as it is now.

        adapter_off: for LCM-LoRA, a context in which the student is the teacher. The teacher gets
        no gradient. Raises ConfigError for settings that do not go together.
        """
        super().__init__(student, diffusion, null, text_dropout=0.0)
        self.settings = settings
        self.stride = _stride(diffusion, settings)  # k
        if (adapter_off is None) != (settings.lora_rank is None):
            raise ConfigError(
                f"lora_rank {settings.lora_rank} was requested "
                f"{'without' if adapter_off is None else 'with'} an adapter that can be switched "
                "off; give both for an LCM-LoRA, or neither"
            )
        if adapter_off is not None and teacher is not None:
            raise ConfigError("give a teacher, or an adapter that can be switched off; not both")
        if teacher is not None and _addresses(teacher) & _addresses(student):
            raise ConfigError(
                "the teacher shares its weights with the student, and would be trained too; leave "
                "it out to distil from a copy"
            )
        self.adapter_off = adapter_off or nullcontext
        self.teacher: PixArtTransformer | None = None
        if adapter_off is None:
            self.teacher = (deepcopy(student) if teacher is None else teacher).requires_grad_(False)
        self.target: PixArtTransformer | None = None
        if settings.target_decay:
            _require_wide(student)
            self.target = deepcopy(student).requires_grad_(False)

    @property
    def units(self) -> Sequence[nn.Module]:
        """Also the blocks of the frozen copies: they run, and are kept, as large as the student."""
        models = [each for each in (self.model, self.teacher, self.target) if each is not None]
        return [block for model in models for block in model.blocks]

    def flops(self, bucket: Bucket, full_checkpointing: bool) -> StepFlops:
        """Of the student's pass and three that are only forward: two teacher's, the target's."""
        config = self.model.config
        step = super().flops(bucket, full_checkpointing)
        plain = text_model(config, bucket.num_tokens, config.max_text_tokens)
        teacher = sum(each.flops for each in plain)  # without the adapters of an LCM-LoRA
        return replace(step, forward=2 * step.forward + 2 * teacher)

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss": [B]} in float32 or wider, and the student's timesteps t_{n+k}."""
        later = (draws.timesteps(self.settings.num_ddim_timesteps) + 1) * self.stride - 1
        earlier = (later - self.stride).clamp(min=0)
        noisy = self.diffusion.q_sample(batch.latents, later, draws.noise)
        with torch.no_grad():  # before the student, whose activations need not be held meanwhile
            moved = self._teacher_step(noisy, later, earlier, batch)
            target = self.model if self.target is None else self.target
            wanted = self._consistent(target, moved, earlier, batch)
        difference = self._consistent(self.model, noisy, later, batch) - wanted
        huber_c = self.settings.huber_c
        loss = (difference.square() + huber_c**2).sqrt() - huber_c
        return {"loss": loss.mean(dim=(1, 2, 3)), TIMESTEPS: later}

    @torch.no_grad()
    def after_step(self, found_inf: Tensor) -> None:
        """Move the target towards the student; not after a step that changed no weight.

        Else the target would catch up with a student that stood still, and a run with skipped steps
        would not be the run without them. The host does not wait to know.
        """
        if self.target is None:
            return
        targets = [local(each) for each in self.target.parameters()]
        values = [local(each.detach()) for each in self.model.parameters()]
        share = (1 - self.settings.target_decay) * (1 - found_inf.to(targets[0].dtype))
        torch._foreach_lerp_(targets, values, [share] * len(targets))

    def own_state(self) -> dict[str, Tensor]:
        """The target's weights. The teacher is what the run started from, and is not kept."""
        if self.target is None:
            return {}
        return {name: each.detach() for name, each in self.target.named_parameters()}

    @torch.no_grad()
    def load_own_state(self, state: dict[str, Tensor]) -> None:
        if self.target is not None:
            for name, each in self.target.named_parameters():
                each.copy_(state[name])

    def _teacher_step(self, noisy: Tensor, later: Tensor, earlier: Tensor, batch: Batch) -> Tensor:
        """Latents at `earlier` by one DDIM step of the guided teacher from those at `later`."""
        given = batch.prompt_embeds, batch.prompt_mask
        null = NullText(self.get_buffer("null_embeds"), self._buffers["null_mask"])
        every = torch.ones(len(batch), dtype=torch.bool, device=noisy.device)
        teacher = self.model if self.teacher is None else self.teacher
        with self.adapter_off():
            guided = self._noise(teacher, noisy, later, given, batch)
            blind = self._noise(teacher, noisy, later, drop_captions(*given, every, null), batch)
        predicted = guided + self.settings.guidance_w * (guided - blind)
        signal, noise = (
            self.diffusion.at(name, earlier, noisy.dtype) for name in ("signal", "noise")
        )
        return signal * self._start(noisy, later, predicted) + noise * predicted

    def _consistent(
        self, model: PixArtTransformer, noisy: Tensor, t: Tensor, batch: Batch
    ) -> Tensor:
        """f(noisy, t): the model's estimate of the latents at timestep 0, [B, C, h, w]."""
        given = batch.prompt_embeds, batch.prompt_mask
        skip, out = boundary_scalings(t, noisy.dtype)
        start = self._start(noisy, t, self._noise(model, noisy, t, given, batch))
        return skip * noisy + out * start

    def _start(self, noisy: Tensor, t: Tensor, predicted: Tensor) -> Tensor:
        """x_0 of noisy latents at t and their noise."""
        shares = (
            self.diffusion.at(f"inverse_{name}", t, noisy.dtype) for name in ("signal", "noise")
        )
        signal, noise = shares
        return signal * noisy - noise * predicted

    def _noise(
        self,
        model: PixArtTransformer,
        noisy: Tensor,
        t: Tensor,
        text: tuple[Tensor, Tensor],
        batch: Batch,
    ) -> Tensor:
        """The noise half of the output, [B, C, h, w] as wide as `noisy`."""
        output = predict_noise(model, self.positions, noisy, t, *text, batch)
        return output[:, : noisy.shape[1]].to(noisy.dtype)


def boundary_scalings(t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at timesteps t [B], as [B, 1, 1, 1]: 1 and 0 at t = 0."""
    scaled = TIMESTEP_SCALING * t.to(dtype)[:, None, None, None]
    squares = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / squares, scaled / squares.sqrt()


def _stride(diffusion: GaussianDiffusion, settings: LcmSettings) -> int:
    stride, rest = divmod(diffusion.num_timesteps, settings.num_ddim_timesteps)
    if rest:
        raise ConfigError(
            f"num_ddim_timesteps {settings.num_ddim_timesteps} does not divide the "
            f"{diffusion.num_timesteps} timesteps of the diffusion; 50 divides 1000"
        )
    return stride


def _addresses(model: nn.Module) -> set[int]:
    return {each.data_ptr() for each in model.parameters()} - {0}  # 0 is the meta device's


def _require_wide(student: nn.Module) -> None:
    """A moving average of half-precision weights loses most of what is added to it."""
    half = {str(each.dtype) for each in student.parameters() if each.element_size() < 4}
    if half:
        raise ConfigError(
            f"a moving average of {', '.join(sorted(half))} weights is not supported; load the "
            "student in float32 (autocast computes in less), or set target_decay to 0"
        )
