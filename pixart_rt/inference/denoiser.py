"""From texts, seeds and sizes to latents: plan, rows of the batch, loop or graph.

DPM-Solver++ runs on tokens (token_loop.py), so that images of different shapes with equal token
counts share a batch. The other samplers are diffusers' and step latents of one shape.

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
from pixart_rt.buckets import Bucket, nearest_bucket
from pixart_rt.config import ModelConfig, SamplingConfig, Saving, Scheduler
from pixart_rt.errors import ConfigError
from pixart_rt.inference.cuda_graphs import GraphKey, Graphs
from pixart_rt.inference.prompts import Encoded, TextCache
from pixart_rt.inference.request_plan import Plan, PlanKey, Planner
from pixart_rt.inference.schedulers import uses_learned_variance
from pixart_rt.inference.step_cache import FirstBlockRun, Skipping, steps_to_skip
from pixart_rt.inference.token_loop import LoopInputs, TextInputs, run_loop
from pixart_rt.kernels.launch import SM80
from pixart_rt.model.embeddings import depatchify, patchify, unpatchify
from pixart_rt.model.signature import ABSORBED
from pixart_rt.model.text_kv import PromptText

VAE_SCALE_FACTOR = 8  # pixels per latent pixel
Before = Callable[[int], None]  # called with the step that comes next; may raise
# step, timestep, latents of each image, and what the step takes for the finished ones
After = Callable[[int, Tensor, list[Tensor], list[Tensor]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be. Texts are names for caches; embeddings that came from a caller have none."""

    bucket: Bucket
    seed: int
    guidance_scale: float
    text: str | None
    encoded: Encoded  # one row
    null_text: str | None
    null: Encoded | None  # None without guidance
    control: Tensor | None = None  # [1, C, h, w], for a transformer with a ControlNet


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
        self.skipped: tuple[int, ...] = ()  # the steps at which the latest call reused others
        can_absorb = device.type == "cpu" or torch.cuda.get_device_capability(device) >= SM80
        self._absorbs = can_absorb and transformer.also_takes.issuperset(ABSORBED)
        everything = torch.arange(config.patch_size**2 * config.out_channels)
        self._all_outputs = everything.to(device)
        noise = everything % config.out_channels < config.in_channels
        self._noise_outputs = everything[noise].to(device)

    def __call__(
        self, items: Sequence[Item], sampling: SamplingConfig, before: Before, after: After | None
    ) -> list[Tensor]:
        """Latents [1, C, h, w] of each image. Their token counts are equal, and so are their
        buckets unless `on_tokens(sampling)`. `after` may replace the latents of each step.
        """
        self.graphs.begin()
        plan = self.planner(_key(items, sampling))
        model = self._model(sampling, plan)
        before(0)
        run = self._on_tokens if self.on_tokens(plan) else self._on_latents
        latents = run(items, sampling, plan, model, before, after)
        self.skipped = model.skipped
        return latents

    def check(self, sampling: SamplingConfig) -> None:
        """Raises ConfigError where the transformer cannot do what `sampling` asks."""
        if isinstance(sampling.approximate, FirstBlockCache) and self._cacheable() is None:
            raise ConfigError(
                f"{sampling.approximate} was asked, but this transformer cannot stop after its "
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
        """Whether the loop of token_loop.py runs for this plan."""
        return plan.coefficients is not None and Saving.FUSED_SOLVER in self.savings

    def mixes(self, sampling: SamplingConfig) -> bool:
        """Whether images of different shapes may share a batch."""
        square = nearest_bucket(self.config.resolution, 1, 1)
        key = PlanKey(sampling.scheduler, sampling.num_inference_steps, (square,))
        return self.on_tokens(self.planner(key))

    def warm(self, items: Sequence[Item], sampling: SamplingConfig) -> None:
        """Run a step of such a batch, of each form; then capture the loop where a CUDA graph can
        hold it. Does nothing where it is captured already.
        """
        plan = self.planner(_key(items, sampling))
        if not self.on_tokens(plan):
            return
        inputs = self._inputs(items, sampling, plan)
        skips = self._model(sampling, plan).planned if self.captures() else None
        key = None if skips is None else self._graph_key(inputs, skips)
        if key is not None and key in self.graphs:
            return
        for guides in {True, False} & set(inputs.guides):
            self._run(replace(inputs, guides=(guides,)))
        if key is not None and skips is not None:
            self.graphs.capture(key, partial(self._run, skips=skips), inputs)

    def captures(self) -> bool:
        """Whether a CUDA graph can hold the transformer's launches."""
        # A caller's own wrapper need not say that it is.
        capturable = getattr(self.transformer, "capturable", False)
        return self.device.type == "cuda" and bool(capturable)

    def _recall(self, inputs: LoopInputs, skips: tuple[int, ...]) -> Tensor | None:
        """The tokens after the last step by a graph, if there is one or it is captured now."""
        may_capture = self.graphs.automatic and self.captures()
        if not may_capture and not len(self.graphs):
            return None  # so most pipelines ask no version of their weights
        run = partial(self._run, skips=skips) if may_capture else None
        return self.graphs.recall(self._graph_key(inputs, skips), run, inputs)

    def _graph_key(self, inputs: LoopInputs, skips: tuple[int, ...]) -> GraphKey:
        weights: Hashable = (self.transformer, self.transformer.version())
        return GraphKey.of(inputs, weights, (inputs.guides, skips))

    def _run(self, inputs: LoopInputs, skips: tuple[int, ...] = ()) -> Tensor:
        return run_loop(Skipping(self.transformer, skips), inputs, self.config.in_channels)

    def _on_tokens(
        self,
        items: Sequence[Item],
        sampling: SamplingConfig,
        plan: Plan,
        model: Skipping | FirstBlockRun,
        before: Before,
        after: After | None,
    ) -> list[Tensor]:
        inputs = self._inputs(items, sampling, plan)
        x = None
        if after is None and model.planned is not None:
            x = self._recall(inputs, model.planned)
        if x is None:
            steps = _Steps(self, items, plan, before, after)
            x = run_loop(model, inputs, self.config.in_channels, steps)
        return self.latents(x, items)

    def latents(self, x: Tensor, items: Sequence[Item]) -> list[Tensor]:
        """Tokens [B, N, C·p·p] as latents [1, C, h, w] of each image."""
        p = self.config.patch_size
        return [depatchify(x[row : row + 1], item.bucket.grid, p) for row, item in enumerate(items)]

    def tokens(self, latents: Sequence[Tensor]) -> Tensor:
        """The opposite of `latents`."""
        return torch.cat([patchify(each, self.config.patch_size) for each in latents])

    def _inputs(self, items: Sequence[Item], sampling: SamplingConfig, plan: Plan) -> LoopInputs:
        assert plan.coefficients is not None
        noise = self._noise(items, _generators(items))
        scales = torch.tensor([item.guidance_scale for item in items])
        coefficients = plan.coefficients[:, None].repeat(1, len(items), 1)
        coefficients[:, :, 5] = scales
        guides = _guides(sampling, len(plan.timesteps))
        plain, guided = self._text(items, guides)
        return LoopInputs(
            x=self.tokens(noise) * plan.noise_scale,
            pos_embed=plan.pos_embed,
            modulation=plan.modulation,
            coefficients=coefficients.to(self.device),
            outputs=self._outputs(sampling.scheduler),
            plain=plain,
            guided=guided,
            guides=guides,
            control=self._control(items),
        )

    def _control(self, items: Sequence[Item]) -> Tensor | None:
        """The control images' latents as tokens [B, N, C·p·p]; None without a ControlNet."""
        found = [item.control.to(self.device) for item in items if item.control is not None]
        assert len(found) in (0, len(items))
        return self.tokens(found) if found else None

    def _outputs(self, scheduler: Scheduler) -> Tensor:
        drops = Saving.NOISE_ONLY in self.savings and not uses_learned_variance(scheduler)
        return self._noise_outputs if drops else self._all_outputs

    def _text(
        self, items: Sequence[Item], guides: tuple[bool, ...]
    ) -> tuple[TextInputs | None, TextInputs | None]:
        """The rows and their text for the steps without guidance, if any, and those with it."""
        images = torch.arange(len(items), device=self.device)
        none = images[:0]
        names = [item.text for item in items]
        text = self.texts(names, Encoded.cat([item.encoded for item in items]))
        nothing = text.kv.new_zeros(len(text.kv), 0, 1, self.config.hidden_size)
        plain = guided = None
        if not all(guides):
            plain = self._attended(none, images, nothing, text, names)
        if not any(guides):
            return plain, None
        null_names = [item.null_text for item in items]
        nulls = [item.null for item in items if item.null is not None]
        null = self.texts(null_names, Encoded.cat(nulls))
        if Saving.CONSTANT_TEXT in self.savings and null.constant is not None:
            guided = self._attended(images, images, null.constant, text, names)
        else:
            twice = torch.cat([images, images])
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
        items: Sequence[Item],
        sampling: SamplingConfig,
        plan: Plan,
        model: Skipping | FirstBlockRun,
        before: Before,
        after: After | None,
    ) -> list[Tensor]:
        bucket = items[0].bucket
        assert all(item.bucket == bucket for item in items)
        solver = self.planner.solver(plan.key)
        generators = _generators(items)
        latents = torch.cat(self._noise(items, generators)) * plan.noise_scale
        guides = _guides(sampling, len(plan.timesteps))
        plain, guided = self._text(items, guides)
        scales = torch.tensor([item.guidance_scale for item in items], device=self.device)
        stochastic = sampling.scheduler is not Scheduler.DPM_SOLVER
        extra = {"generator": generators} if stochastic else {}
        control = self._control(items)
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
                both = list(latents.split(1)), list(denoised.split(1))
                latents = torch.cat(after(step, timestep, *both))
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

    def _noise(self, items: Sequence[Item], generators: Sequence[torch.Generator]) -> list[Tensor]:
        """The initial noise [1, C, h, w] of each image, drawn on the CPU."""
        noise = []
        for item, generator in zip(items, generators, strict=True):
            height, width = item.bucket.height, item.bucket.width
            shape = (
                1, self.config.in_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR
            )  # fmt: skip
            noise.append(torch.randn(shape, generator=generator).to(self.device))
        return noise


class _Steps:
    """What happens between the steps of a loop that is no graph."""

    def __init__(
        self,
        denoiser: Denoiser,
        items: Sequence[Item],
        plan: Plan,
        before: Before,
        after: After | None,
    ) -> None:
        self._denoiser, self._items, self._plan = denoiser, items, plan
        self._before, self._after = before, after

    def __call__(self, step: int, x: Tensor, x0: Tensor) -> Tensor:
        if self._after is not None:
            shown = self._denoiser.latents(x, self._items)
            denoised = self._denoiser.latents(x0, self._items)
            latents = self._after(step, self._plan.timesteps[step], shown, denoised)
            if latents is not shown:
                x = self._denoiser.tokens(latents)
        if step + 1 < len(self._plan.timesteps):
            self._before(step + 1)
        return x


def _key(items: Sequence[Item], sampling: SamplingConfig) -> PlanKey:
    buckets = tuple(item.bucket for item in items)
    return PlanKey(sampling.scheduler, sampling.num_inference_steps, buckets)


def _guides(sampling: SamplingConfig, num_steps: int) -> tuple[bool, ...]:
    return tuple(sampling.guides(step) for step in range(num_steps))


def _generators(items: Sequence[Item]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(item.seed) for item in items]
