"""From texts, seeds and sizes to latents: plan, rows of the batch, loop or graph.

DPM-Solver++ runs on tokens (token_loop.py), so that images of different shapes with equal token
counts share a batch; its tokens become latents after the last step, and before that only for an
`After`. The other samplers are diffusers' and step latents of one shape.

B images, C latent channels, h×w latent pixels, T text tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pixart_rt.approximations import FirstBlockCache, StepCache
from pixart_rt.backends.component import Component
from pixart_rt.buckets import VAE_SCALE_FACTOR, Bucket, nearest_bucket
from pixart_rt.config import ModelConfig, SamplingConfig, Saving, Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.inference.cuda_graphs import GraphKey, Graphs
from pixart_rt.inference.prompt_embeds import PromptEmbeds
from pixart_rt.inference.prompts import TextCache
from pixart_rt.inference.request_plan import Plan, PlanKey, Planner
from pixart_rt.inference.schedulers import uses_learned_variance
from pixart_rt.inference.step_cache import FirstBlockRun, Skipping, steps_to_skip
from pixart_rt.inference.token_loop import LoopInputs, OnStep, TextInputs, run_loop
from pixart_rt.kernels.launch import SM80
from pixart_rt.kernels.solver import Coefficient
from pixart_rt.model.embeddings import depatchify, patchify, unpatchify
from pixart_rt.model.signature import ABSORBED
from pixart_rt.model.text_kv import PromptText

Before = Callable[[int], None]  # called with the step that comes next; may raise
# step, timestep, latents [B, C, h, w], and what the step takes for the finished ones; the latents
# to go on with, which may be the first changed in place
After = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """What one image of a batch is made from."""

    bucket: Bucket
    seed: int
    guidance_scale: float
    prompt: PromptEmbeds  # of one prompt, as the next
    negative: PromptEmbeds | None  # None without guidance
    control: Tensor | None = None  # [1, C, h, w], for a transformer with a ControlNet
    generator: torch.Generator | None = None  # draws the noise instead of the seed

    def noise_source(self) -> torch.Generator:
        """The generator of the image's noise: the caller's own, or a fresh one of the seed."""
        return self.generator or torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, slots=True)
class Denoised:
    """Latents [1, C, h, w] of each image, and the steps at which the model did not run."""

    latents: list[Tensor]
    skipped_steps: tuple[int, ...] = ()


class Denoiser:
    """Latents of a batch of images. `savings` may be changed at any time."""

    def __init__(
        self,
        transformer: Component,
        config: ModelConfig,
        planner: Planner,
        texts: TextCache,
        device: torch.device,
        savings: frozenset[Saving],
    ) -> None:
        self.transformer, self.config, self.planner = transformer, config, planner
        self.texts, self.device, self.savings = texts, device, savings
        self.graphs: Graphs[LoopInputs] = Graphs()
        can_absorb = device.type == "cpu" or torch.cuda.get_device_capability(device) >= SM80
        self._absorbs = can_absorb and transformer.also_takes.issuperset(ABSORBED)
        everything = torch.arange(config.patch_size**2 * config.out_channels)
        self._all_outputs = everything.to(device)
        noise = everything % config.out_channels < config.in_channels
        self._noise_outputs = everything[noise].to(device)

    def __call__(
        self,
        images: Sequence[ImageInputs],
        sampling: SamplingConfig,
        before: Before,
        after: After | None,
    ) -> Denoised:
        """Denoise images of equal token counts, and of one bucket unless `mixes(sampling)`.

        `after`, for images of one bucket, sees the latents of each step and may change them; with
        it no graph is replayed. `before` is called with 0, and where no graph replays all steps
        with each of the others.
        """
        self.graphs.begin()
        plan = self.planner(plan_key(images, sampling))
        model = self._model(sampling, plan)
        before(0)
        run = self._on_tokens if self.on_tokens(plan) else self._on_latents
        latents = run(images, sampling, plan, model, before, after)
        return Denoised(latents, model.skipped)

    def check(self, sampling: SamplingConfig) -> None:
        """Raises ConfigError where the transformer cannot do what `sampling` asks."""
        if isinstance(sampling.approximate, FirstBlockCache) and self._cacheable() is None:
            raise ConfigError(
                f"{sampling.approximate} was requested, but this transformer cannot stop after its "
                "first block; use a step cache, or a bundle built with --backend torch"
            )

    def _cacheable(self) -> Callable[..., Tensor] | None:
        # Engines have none, nor have wrappers that a caller put around the transformer.
        return getattr(self.transformer, "cacheable", None)

    def _model(self, sampling: SamplingConfig, plan: Plan) -> Skipping | FirstBlockRun:
        """The transformer as one run of a loop calls it, once for each step."""
        approximate, steps = sampling.approximate, len(plan.timesteps)
        if isinstance(approximate, FirstBlockCache):
            self.check(sampling)
            cacheable = self._cacheable()
            assert cacheable is not None
            return FirstBlockRun(cacheable, steps, approximate.threshold)
        if isinstance(approximate, StepCache):
            guides = _guides(sampling, steps)
            skips = steps_to_skip(plan.changes, guides, approximate.threshold)
            return Skipping(self.transformer, skips)
        return Skipping(self.transformer)

    def on_tokens(self, plan: Plan) -> bool:
        """True where the loop of token_loop.py runs for this plan."""
        return plan.coefficients is not None and Saving.FUSED_SOLVER in self.savings

    def mixes(self, sampling: SamplingConfig) -> bool:
        """True where images of different shapes may share a batch."""
        square = nearest_bucket(self.config.resolution, 1, 1)
        key = PlanKey(sampling.scheduler, sampling.num_inference_steps, (square,))
        return self.on_tokens(self.planner(key))

    def warm(self, images: Sequence[ImageInputs], sampling: SamplingConfig) -> None:
        """Run a step of such a batch, of each form; then capture the loop where a CUDA graph can
        hold it. Does nothing where it is captured already.
        """
        plan = self.planner(plan_key(images, sampling))
        if not self.on_tokens(plan):
            return
        inputs = self.loop_inputs(images, sampling, plan)
        skips = self._model(sampling, plan).planned if self.captures() else None
        key = None if skips is None else self.graph_key(inputs, skips)
        if key is not None and key in self.graphs:
            return
        for guides in {True, False} & set(inputs.guides):
            self.run_loop(replace(inputs, guides=(guides,)))
        if key is not None and skips is not None:
            self.graphs.capture(key, partial(self.run_loop, skips=skips), inputs)

    def captures(self) -> bool:
        """True where a CUDA graph can hold the transformer's launches."""
        # A caller's own wrapper need not say that it is.
        capturable = getattr(self.transformer, "capturable", False)
        return self.device.type == "cuda" and bool(capturable)

    def _recall(self, inputs: LoopInputs, skips: tuple[int, ...]) -> Tensor | None:
        """The tokens after the last step by a graph, if there is one or it is captured now."""
        may_capture = self.graphs.automatic and self.captures()
        if not may_capture and not len(self.graphs):
            return None  # so most pipelines ask no version of their weights
        run = partial(self.run_loop, skips=skips) if may_capture else None
        return self.graphs.recall(self.graph_key(inputs, skips), run, inputs)

    def graph_key(self, inputs: LoopInputs, skips: tuple[int, ...]) -> GraphKey:
        weights: Hashable = (self.transformer, self.transformer.version())
        return GraphKey.of(inputs, weights, (inputs.guides, skips))

    def run_loop(self, inputs: LoopInputs, skips: tuple[int, ...] = ()) -> Tensor:
        """The tokens after the last step, without a graph and with nobody to be told."""
        return run_loop(Skipping(self.transformer, skips), inputs, self.config.in_channels)

    def _on_tokens(
        self,
        images: Sequence[ImageInputs],
        sampling: SamplingConfig,
        plan: Plan,
        model: Skipping | FirstBlockRun,
        before: Before,
        after: After | None,
    ) -> list[Tensor]:
        inputs = self.loop_inputs(images, sampling, plan)
        x = None
        if after is None and model.planned is not None:
            x = self._recall(inputs, model.planned)
        if x is None:
            on_step = self._on_step(images, plan, before, after)
            x = run_loop(model, inputs, self.config.in_channels, on_step)
        p = self.config.patch_size
        return [
            depatchify(x[row : row + 1], image.bucket.grid, p) for row, image in enumerate(images)
        ]

    def _on_step(
        self, images: Sequence[ImageInputs], plan: Plan, before: Before, after: After | None
    ) -> OnStep:
        """Between the steps of a loop that is no graph."""
        grid, p = images[0].bucket.grid, self.config.patch_size
        assert after is None or all(image.bucket.grid == grid for image in images)

        def on_step(step: int, x: Tensor, x0: Tensor) -> Tensor:
            if after is not None:
                latents, denoised = depatchify(x, grid, p), depatchify(x0, grid, p)
                x = patchify(after(step, plan.timesteps[step], latents, denoised), p)
            if step + 1 < len(plan.timesteps):
                before(step + 1)
            return x

        return on_step

    def loop_inputs(
        self, images: Sequence[ImageInputs], sampling: SamplingConfig, plan: Plan
    ) -> LoopInputs:
        """All that the loop on tokens reads, on the device."""
        assert plan.coefficients is not None
        noise = self._noise(images, [image.noise_source() for image in images])
        coefficients = plan.coefficients[:, None].repeat(1, len(images), 1)
        coefficients[..., Coefficient.GUIDANCE] = torch.tensor(
            [image.guidance_scale for image in images]
        )
        guides = _guides(sampling, len(plan.timesteps))
        plain, guided = self._text(images, guides)
        return LoopInputs(
            x=self._tokens(noise) * plan.noise_scale,
            pos_embed=plan.pos_embed,
            modulation=plan.modulation,
            coefficients=coefficients.to(self.device),
            outputs=self._outputs(sampling.scheduler),
            plain=plain,
            guided=guided,
            guides=guides,
            control=self._control(images),
        )

    def _tokens(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents [1, C, h, w] of each image as tokens [B, N, C·p·p]."""
        return torch.cat([patchify(image, self.config.patch_size) for image in latents])

    def _control(self, images: Sequence[ImageInputs]) -> Tensor | None:
        """The control images' latents as tokens [B, N, C·p·p]; None without a ControlNet."""
        controls = [image.control.to(self.device) for image in images if image.control is not None]
        assert len(controls) in (0, len(images))
        return self._tokens(controls) if controls else None

    def _outputs(self, scheduler: Scheduler) -> Tensor:
        drops = Saving.NOISE_ONLY in self.savings and not uses_learned_variance(scheduler)
        return self._noise_outputs if drops else self._all_outputs

    def _text(
        self, images: Sequence[ImageInputs], guides: tuple[bool, ...]
    ) -> tuple[TextInputs | None, TextInputs | None]:
        """The rows and their text for the steps without guidance, if any, and those with it."""
        rows = torch.arange(len(images), device=self.device)
        none = rows[:0]
        prompts = [image.prompt for image in images]
        text, names = self.texts(prompts), _names(prompts)
        nothing = text.kv.new_zeros(len(text.kv), 0, 1, self.config.hidden_size)
        plain = guided = None
        if not all(guides):
            plain = self._attended(none, rows, nothing, text, names)
        if not any(guides):
            return plain, None
        negatives = [image.negative for image in images if image.negative is not None]
        null, null_names = self.texts(negatives), _names(negatives)
        if Saving.CONSTANT_TEXT in self.savings and null.constant is not None:
            guided = self._attended(rows, rows, null.constant, text, names)
        else:
            twice = torch.cat([rows, rows])
            both = PromptText.cat([null, text])
            guided = self._attended(none, twice, nothing, both, [*null_names, *names])
        return plain, guided

    def _attended(
        self,
        null_rows: Tensor,
        text_rows: Tensor,
        constant: Tensor,
        text: PromptText,
        names: Sequence[str | None],
    ) -> TextInputs:
        rows = partial(TextInputs, null_rows, text_rows, constant, text.mask)
        if self._absorbs and Saving.ABSORBED_TEXT in self.savings:
            absorbed = self.texts.absorbed(names, text)
            if absorbed is not None:
                return rows(**dict(zip(ABSORBED, absorbed, strict=True)))
        return rows(text_kv=text.kv)

    def _on_latents(
        self,
        images: Sequence[ImageInputs],
        sampling: SamplingConfig,
        plan: Plan,
        model: Skipping | FirstBlockRun,
        before: Before,
        after: After | None,
    ) -> list[Tensor]:
        bucket = images[0].bucket
        assert all(image.bucket == bucket for image in images)
        solver = self.planner.solver(plan.key)
        generators = [image.noise_source() for image in images]
        latents = torch.cat(self._noise(images, generators)) * plan.noise_scale
        guides = _guides(sampling, len(plan.timesteps))
        plain, guided = self._text(images, guides)
        scales = torch.tensor([image.guidance_scale for image in images], device=self.device)
        stochastic = sampling.scheduler is not Scheduler.DPM_SOLVER
        extra = {"generator": generators} if stochastic else {}
        control = self._control(images)
        also = {} if control is None else {"control": control}
        for step, timestep in enumerate(plan.timesteps):
            if step:
                before(step)
            text = guided if guides[step] else plain
            assert text is not None
            noise = model(
                tokens=patchify(
                    solver.scale_model_input(latents, timestep), self.config.patch_size
                ),
                pos_embed=plan.pos_embed,
                modulation=plan.modulation[step],
                outputs=self._outputs(sampling.scheduler),
                **text.to_dict(),
                **also,
            )
            noise = unpatchify(noise, bucket.grid, self.config.patch_size)
            noise = self._guide(noise, scales, sampling.scheduler)
            latents, *rest = solver.step(noise, timestep, latents, **extra, return_dict=False)
            if after is not None:
                denoised = rest[0] if rest else solver.model_outputs[-1]
                # The solver may keep `denoised`, which is the last step's latents with some.
                latents = after(step, timestep, latents, denoised.clone())
        return list(latents.split(1))

    def _guide(self, noise: Tensor, scales: Tensor, scheduler: Scheduler) -> Tensor:
        """Classifier-free guidance on the noise; a learned variance is the conditional half's."""
        variance = noise[:, self.config.in_channels :]
        noise = noise[:, : self.config.in_channels]
        if len(noise) != len(scales):
            null, cond = noise.chunk(2)
            noise = null + scales[:, None, None, None] * (cond - null)
            variance = variance.chunk(2)[1]
        return torch.cat([noise, variance], dim=1) if uses_learned_variance(scheduler) else noise

    def _noise(
        self, images: Sequence[ImageInputs], generators: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """The initial noise [1, C, h, w] of each image, drawn where its generator is: the CPU,
        unless a caller's is elsewhere.
        """
        noise = []
        for image, generator in zip(images, generators, strict=True):
            height, width = image.bucket.height, image.bucket.width
            shape = (
                1, self.config.in_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR
            )  # fmt: skip
            drawn = torch.randn(shape, generator=generator, device=generator.device)
            noise.append(drawn.to(self.device))
        return noise


def plan_key(images: Sequence[ImageInputs], sampling: SamplingConfig) -> PlanKey:
    """The key of the plan for a batch."""
    buckets = tuple(image.bucket for image in images)
    return PlanKey(sampling.scheduler, sampling.num_inference_steps, buckets)


def _guides(sampling: SamplingConfig, num_steps: int) -> tuple[bool, ...]:
    return tuple(sampling.guides(step) for step in range(num_steps))


def _names(rows: Sequence[PromptEmbeds]) -> list[str | None]:
    return [name for row in rows for name in row.texts]
