"""Prompt to images: encode, plan, denoise, decode. Owns the loop, knows no backend.

B images of a batch, C latent channels, h×w latent pixels, N tokens. Latents, guidance and solver
are float32 whatever the engines' precision. Argument names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.approximations import Approximation, FirstBlockCache, StepCache
from pixart_rt.backends.component import Component
from pixart_rt.backends.loading import Loader
from pixart_rt.buckets import Bucket, bucket_for_aspect, choose_bucket
from pixart_rt.buckets import buckets as _all_buckets
from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.config import (
    DISTILLED,
    USUAL_STEPS,
    CfgNull,
    Precision,
    Quality,
    SamplingConfig,
    Saving,
    Scheduler,
    TextPlace,
)
from pixart_rt.errors import BundleError, Cancelled, ConfigError, NumericsError
from pixart_rt.inference.control import ControlImage, Controls
from pixart_rt.inference.denoiser import After, Denoiser, Item
from pixart_rt.inference.images import finish
from pixart_rt.inference.preview import ColourPreview, Previewer, TinyPreview, to_pictures
from pixart_rt.inference.prompts import (
    NULL_PROMPT,
    Encoded,
    PromptEncoder,
    TextCache,
    unconditional,
)
from pixart_rt.inference.request_plan import Planner, load_modulator
from pixart_rt.inference.schedulers import uses_learned_variance
from pixart_rt.inference.vae_tiling import TiledDecoder
from pixart_rt.model.text_kv import TEXT_SIDE, TextSide
from pixart_rt.model.tokenizer import PromptTokenizer

DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
BATCHES_AHEAD = 4  # of generate_many, whose prompts are encoded together; XL: 2 MB each
WARMUP_PROMPTS = ("a red circle above a blue square", " ".join(["a quiet harbour"] * 8))
Progress = Callable[[str, int, int], None]
StepCallback = Callable[
    ["PixArtPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineOutput:
    """Images in the asked form, and what made each of them."""

    images: Any  # list of PIL images, or a tensor [B, ...] for output_type "pt" and "latent"
    prompts: list[str]
    seeds: list[int]
    bucket: Bucket
    skipped_steps: list[tuple[int, ...]]  # of each image, from 0; empty unless `approximate`


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One image of `PixArtPipeline.generate_many`; settings as in a call of the pipeline."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance_scale: float | None = None
    aspect_ratio: str | None = None
    height: int | None = None
    width: int | None = None
    control_image: Image | None = None


class _Placed:
    """A component whose inputs are brought to its device: not every backend uses the GPU."""

    def __init__(self, component: Component, device: torch.device) -> None:
        self.component, self.device = component, device
        self.also_takes = component.also_takes
        self.capturable = component.capturable and device.type == "cuda"
        self.cacheable = getattr(component, "cacheable", None)  # few backends' are

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.component(**{name: tensor.to(self.device) for name, tensor in inputs.items()})

    def version(self) -> Hashable:
        return self.component.version()


class PixArtPipeline:
    """Makes images from a bundle of engines. One instance serves one thread.

    What does not change from step to step, or from one request to the next, is computed once
    (`denoiser.planner`, `prompt_encoder`, `denoiser.texts`). `denoiser.savings` says which work is
    left out; the images are the same without any of them.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        components: dict[str, Component],
        device: torch.device,
        prompt_cache: Path | None = None,
        *,
        auto_capture: bool = True,
    ) -> None:
        self.manifest, self.folder, self.device = manifest, Path(folder), device
        self.config = manifest.config
        self.resolution = int(manifest.engine_config["resolution"])
        self.max_batch = int(manifest.engine_config["max_batch"])
        self.quality = manifest.quality
        self.vae_decoder = components["vae_decoder"]
        self.vae_tiling = manifest.vae_tiling  # unless a call says otherwise
        self.prompt_encoder: PromptEncoder | None = None
        if "text_encoder" in components:
            self.prompt_encoder = PromptEncoder(
                PromptTokenizer(self.folder / "tokenizer", self.config.max_text_tokens),
                components["text_encoder"],
                device,
                2 * self.max_batch,
                null_prompt=self.folder / NULL_PROMPT,
                disk=prompt_cache,
                disk_key=_text_key(manifest),
            )
        self.y_embedding: Tensor | None = None
        if self.config.cfg_null is CfgNull.Y_EMBEDDING:
            path = self.folder / "y_embedding.safetensors"
            if path.is_file():
                self.y_embedding = load_file(path)["y_embedding"].float().to(device)
        self.denoiser = self._make_denoiser(components["transformer"])
        self.auto_capture = auto_capture
        self.controls = Controls(manifest, self.folder, device)
        self._previewer: Previewer | None = None  # the bundle's own, read when first asked
        self._interrupted = False

    def _make_denoiser(self, transformer: Component) -> Denoiser:
        precision = DTYPES[Precision(self.manifest.engine_config["precision"])]
        savings = frozenset(Saving)
        lossless = None
        if self.quality is Quality.LOSSLESS:  # absorbed text rounds elsewhere
            lossless, savings = precision, savings - {Saving.ABSORBED_TEXT}
        modulator = load_modulator(self.folder / "modulator.safetensors", self.config)
        planner = Planner(modulator, self.config, self.folder / "scheduler", self.device, lossless)
        # An engine in half precision may run on a CPU, where PyTorch is slow in float16.
        wide = self.device.type == "cpu" and precision is torch.float16
        control = self.manifest.control
        copies = 0 if control is None else control.num_copies
        side = TextSide.load(self.folder / TEXT_SIDE, self.config, copies)
        texts = TextCache(side.to(self.device, torch.float32 if wide else precision))
        return Denoiser(transformer, self.config, planner, texts, self.device, savings)

    @property
    def transformer(self) -> Component:
        """The denoising transformer; it may be replaced, by a wrapper for instance, whose Python
        code does not run where a CUDA graph replays the launches.
        """
        return self.denoiser.transformer

    @transformer.setter
    def transformer(self, component: Component) -> None:
        self.denoiser.transformer = component

    @property
    def auto_capture(self) -> bool:
        """Capture CUDA graphs of shapes that are requested again (cuda_graphs.py).

        The loop is captured with its second batch, the text encoder with its second call. Graphs
        stay when this is switched off.
        """
        return self.denoiser.graphs.automatic

    @auto_capture.setter
    def auto_capture(self, wanted: bool) -> None:
        self.denoiser.graphs.automatic = wanted
        if self.prompt_encoder is not None:
            self.prompt_encoder.graphs.automatic = wanted

    @property
    def captures(self) -> bool:
        """Whether a second batch of one shape, without a callback, is captured as a CUDA graph."""
        return self.auto_capture and self.denoiser.captures()

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        check: bool = True,
        prompt_cache: str | Path | None = None,
        text_place: TextPlace | None = None,
        cuda_graphs: bool = False,
        auto_capture: bool = True,
    ) -> PixArtPipeline:
        """Load a bundle; by default each component on the GPU if its backend can use one.

        check: compare every file with its hash first (about a second per GB).
        prompt_cache: a folder that keeps embeddings of prompts for later processes.
        text_place, cuda_graphs: see backends.loading.Loader.
        auto_capture: see the attribute; only the PyTorch and AOTInductor backends on a GPU have
            such graphs.
        Raises BundleError for a bundle that is damaged or lacks a component, BackendError where it
        cannot run.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        damaged = damaged_files(path, manifest) if check else {}
        if damaged:
            name, state = next(iter(damaged.items()))
            raise BundleError(f"{path}: {name} is {state}; build the bundle again")
        lacking = {"transformer", "vae_decoder"} - set(manifest.components)
        if lacking:
            raise BundleError(
                f"{path} was built without {', '.join(sorted(lacking))}; images need it: build "
                "again without --components"
            )
        components: dict[str, Component] = {}
        places: dict[str, torch.device] = {}
        loader = Loader(text_place, cuda_graphs=cuda_graphs)
        for name in manifest.components:
            loaded, places[name] = loader.load(path, manifest, name, device)
            components[name] = _Placed(loaded, places[name])
        cache = None if prompt_cache is None else Path(prompt_cache)
        device = places["transformer"]
        return cls(manifest, path, components, device, cache, auto_capture=auto_capture)

    def interrupt(self) -> None:
        """Stop the image in work: its call raises Cancelled before the next step, or before the
        next batch where a CUDA graph replays all steps.
        """
        self._interrupted = True

    def preview(self, latents: Tensor, size: int | None = None) -> list[Image]:
        """Small pictures of latents [B, C, h, w], such as a step's callback is given.

        size: the longest side in pixels; by default that of the latents, or with a preview decoder
        the image's. Raises BundleError for a bundle that was built without previews.
        """
        if self._previewer is None:
            self._previewer = ColourPreview.read(self.folder)
        return to_pictures(self._previewer(latents), size)

    def load_preview_decoder(self, folder: str | Path) -> None:
        """Preview with a diffusers AutoencoderTiny from now on. Raises CheckpointError."""
        self._previewer = TinyPreview(Path(folder), self.config.in_channels, self.device)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        aspect_ratio: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        scheduler: str | Scheduler | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pil",
        vae_tiling: bool | None = None,
        approximate: Approximation | None = None,
        control_image: ControlImage | None = None,
        control_latents: Tensor | None = None,
    ) -> PipelineOutput:
        """Make `num_images_per_prompt` images of every prompt.

        num_inference_steps: 20 by default; 4 with LCM and 1 with DMD.
        guidance_scale: 4.5 by default; 1 or less runs without the unconditional half, as LCM
            and DMD do by default.
        guidance_interval: the part of the steps that is guided; the others run without the
            unconditional half, at half the cost, and make another image.
        aspect_ratio: "W:H", the nearest of the 40 trained buckets; or height and width in pixels,
            made at the nearest bucket, then resized and centre-cropped.
        seed: image k (prompts in order, each with its images) draws from seed + k, or from
            seed[k]; the same seed gives the same noise on any device and at any batch position.
        prompt_embeds [B, T, C] and prompt_attention_mask [B, T] replace the prompt, and likewise
            the negative ones.
        scheduler: one of Scheduler; by default the checkpoint's own, DPM-Solver++ or LCM.
        approximate: reuse earlier steps, for another image at less work (approximations.py); the
            output says which steps were skipped. With FirstBlockCache the host waits for the
            device once a step, and a step is skipped only where the whole batch allows it.
        callback_on_step_end(pipe, step, timestep, {"latents": ..., "denoised": ...}) may return
            new latents; `denoised` is the step's estimate of the final ones, which `preview`
            shows. Images are made `max_batch` at a time; each batch calls it for every step.
        output_type: "pil", "np", "pt" or "latent".
        A batch without a callback replays its CUDA graph, if `warmup` or an earlier batch of the
            same shape captured one (see `auto_capture`).
        control_image: for a bundle with a ControlNet, and only for one: a picture of edges, or one
            for each image, scaled and centre-cropped to the bucket; or control_latents
            [1 or images, C, h, w] of such pictures, times the VAE's scaling factor.
        vae_tiling: decode in overlapping tiles, one at a time: less memory, almost the same image.
            By default as the bundle was built.
        The loop waits for the device nowhere; samplers that add noise (SA-Solver, iDDPM, LCM) draw
        it on the CPU and copy it. The finished images are checked once for NaN.
        Raises ConfigError for impossible arguments, Cancelled after `interrupt`, NumericsError
        for an image that is not finite.
        """
        self._interrupted = False
        self._begin_texts()
        sampling = self._sampling(
            num_inference_steps, guidance_scale, scheduler, guidance_interval, approximate
        )
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}"
            )
        bucket = choose_bucket(self.resolution, aspect_ratio, height, width)
        given = self._given(prompt_embeds, prompt_attention_mask)
        given_null = self._given(negative_prompt_embeds, negative_prompt_attention_mask)
        if (prompt is None) == (given is None):
            raise ConfigError("give prompt or prompt_embeds with its mask, one of the two")
        if num_images_per_prompt < 1:
            raise ConfigError(
                f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}"
            )
        prompts = None if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        if prompts == []:
            raise ConfigError("the list of prompts is empty")
        count = len(prompts) if prompts is not None else len(given.embeds) if given else 0
        negatives = _per_prompt(negative_prompt, count)
        rows = self._rows(prompts, negatives, sampling.guided, given, given_null)
        seeds = _seeds(seed, count * num_images_per_prompt)
        repeated = [row for row in rows for _ in range(num_images_per_prompt)]
        controls = self.controls(control_image, control_latents, bucket, len(repeated))
        items = [
            row.item(bucket, seed, sampling.guidance_scale, control)
            for row, seed, control in zip(repeated, seeds, controls, strict=True)
        ]
        decode = self._decoder(vae_tiling)
        images, skipped = [], []
        for start in range(0, len(items), self.max_batch):
            chunk = items[start : start + self.max_batch]
            after = self._after(callback_on_step_end)
            latents = torch.cat(self.denoiser(chunk, sampling, self._before(sampling), after))
            skipped += [self.denoiser.skipped] * len(chunk)
            images.append(latents if output_type == "latent" else decode(latents=latents))
        whole = torch.cat(images)
        self._require_finite(whole, sampling)
        finished = finish(whole, height, width, output_type)
        texts = [row.text or "" for row in repeated]
        return PipelineOutput(
            images=finished, prompts=texts, seeds=seeds, bucket=bucket, skipped_steps=skipped
        )

    @torch.inference_mode()
    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        scheduler: str | Scheduler | None = None,
        approximate: Approximation | None = None,
        output_type: str = "pil",
    ) -> list[Any]:
        """Many images at once, each with its own prompt, seed, guidance and shape.

        With DPM-Solver++ images of equal token counts share a batch of at most `max_batch` whatever
        their shapes: 8 of the 40 shapes of 1024 px have 3840 tokens. With other samplers, and with
        `approximate`, images of one shape do. An image does not depend on its batch, beyond sums in
        another order: in float32 its latents agree to 1e-4 of their norm.
        approximate: a step cache, whose steps follow from the shape; a first-block cache skips a
            step where the whole batch allows it, so that an image would depend on its batch.
        Prompts of several batches are encoded together, the short ones apart from the long.
        Returns an image per request in their order: PIL, or with output_type "np", "pt" or
        "latent" an array or tensor [1, ...]. Raises as a call does.
        """
        if output_type not in OUTPUT_TYPES:
            raise ConfigError(
                f"output_type {output_type!r} is not one of {', '.join(OUTPUT_TYPES)}"
            )
        if isinstance(approximate, FirstBlockCache):
            raise ConfigError(
                f"{approximate} was asked of generate_many, whose images must not depend on their "
                "batch; use a step cache, or call the pipeline for each"
            )
        self._interrupted = False
        settings, controls = [], []
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            sampling = self._sampling(
                num_inference_steps, request.guidance_scale, scheduler, guidance_interval,
                approximate,
            )  # fmt: skip
            bucket = choose_bucket(
                self.resolution, request.aspect_ratio, request.height, request.width
            )
            settings.append((sampling, bucket))
            controls += self.controls(request.control_image, None, bucket, 1)
            mixes = approximate is None and self.denoiser.mixes(sampling)
            shape = bucket.num_tokens if mixes else bucket
            groups.setdefault((shape, sampling.guided), []).append(index)
        batches = [
            members[start : start + self.max_batch]
            for members in groups.values()
            for start in range(0, len(members), self.max_batch)
        ]
        done: list[Any] = [None] * len(requests)
        for first in range(0, len(batches), BATCHES_AHEAD):
            self._begin_texts()
            ahead = batches[first : first + BATCHES_AHEAD]
            rows = self._rows_of(requests, [index for batch in ahead for index in batch], settings)
            for batch in ahead:
                sampling = settings[batch[0]][0]
                items = [
                    rows[index].item(
                        settings[index][1], requests[index].seed,
                        settings[index][0].guidance_scale, controls[index],
                    )
                    for index in batch
                ]  # fmt: skip
                latents = self.denoiser(items, sampling, self._before(sampling), None)
                for index, each in zip(batch, latents, strict=True):
                    done[index] = self._image(each, requests[index], sampling, output_type)
        return done

    def _rows_of(
        self,
        requests: Sequence[Request],
        indices: Sequence[int],
        settings: Sequence[tuple[SamplingConfig, Bucket]],
    ) -> dict[int, _Row]:
        """The rows of these requests by their index, encoded together."""
        found: dict[int, _Row] = {}
        for guided in (True, False):
            chosen = [index for index in indices if settings[index][0].guided is guided]
            if not chosen:
                continue
            prompts = [requests[index].prompt for index in chosen]
            negatives = [requests[index].negative_prompt for index in chosen]
            rows = self._rows(prompts, negatives, guided, None, None)
            found.update(zip(chosen, rows, strict=True))
        return found

    @torch.inference_mode()
    def warmup(
        self,
        buckets: Sequence[Bucket | str] | None = None,
        *,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str | Scheduler | None = None,
        prompts: Sequence[str] = WARMUP_PROMPTS,
        approximate: StepCache | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Do now what the first request of each shape would wait for; returns the graphs captured.

        buckets: those of the bundle's resolution, or aspect ratios "W:H"; by default all 40, which
            have far fewer token counts, and the graphs are by token count.
        prompts: one of each length that will be asked: cross-attention has another form for up to
            16, 32 and 64 tokens and above.
        approximate: that of the requests to come; their graphs hold the steps that are not skipped.
        progress: called with a name, shapes done and shapes in all; by default a bar on stderr.
        On a GPU the PyTorch and AOTInductor backends capture their loop as a CUDA graph, which a
        later request of the same shape replays, unless it has a callback; and the text encoder at
        each of its lengths, for one prompt and for `batch_size`, unless it is offloaded or on the
        CPU. Elsewhere a step runs once for each shape, which compiles what is compiled at first
        use.
        """
        sampling = self._sampling(
            num_inference_steps, guidance_scale, scheduler, approximate=approximate
        )
        shapes: dict[int, Bucket] = {}
        for each in buckets if buckets is not None else _all_buckets(self.resolution):
            bucket = each if isinstance(each, Bucket) else bucket_for_aspect(self.resolution, each)
            shapes.setdefault(bucket.num_tokens, bucket)
        work = [(bucket, prompt) for bucket in shapes.values() for prompt in prompts]
        before = self._num_captures()
        with _reporting(progress) as report:
            if self.prompt_encoder is not None:
                report("text encoder", 0, len(work))
                for num_prompts in sorted({1, batch_size}):
                    self.prompt_encoder.warm(num_prompts)
            for index, (bucket, prompt) in enumerate(work):
                report(f"{bucket.num_tokens} tokens", index, len(work))
                rows = self._rows([prompt], [""], sampling.guided, None, None)
                control = self.controls.blank(bucket) if self.controls.wanted else None
                item = rows[0].item(bucket, 0, sampling.guidance_scale, control)
                self.denoiser.warm([item] * batch_size, sampling)
            report("ready", len(work), len(work))
        return self._num_captures() - before

    def _begin_texts(self) -> None:
        """The texts of one call are one request: prompt and negative prompt may be of one shape."""
        if self.prompt_encoder is not None:
            self.prompt_encoder.graphs.begin()

    def _num_captures(self) -> int:
        texts = 0 if self.prompt_encoder is None else self.prompt_encoder.graphs.captures
        return self.denoiser.graphs.captures + texts

    def _sampling(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        scheduler: str | Scheduler | None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        approximate: Approximation | None = None,
    ) -> SamplingConfig:
        """Checked settings, with the checkpoint's own where nothing is asked."""
        chosen = _enum(scheduler or self.manifest.scheduler)
        if guidance_scale is None:
            guidance_scale = 1.0 if chosen in DISTILLED else 4.5
        if num_inference_steps is None:
            num_inference_steps = USUAL_STEPS.get(chosen, SamplingConfig().num_inference_steps)
        sampling = SamplingConfig(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler=chosen,
            guidance_interval=guidance_interval,
            approximate=approximate,
        )
        self.denoiser.check(sampling)
        if chosen in DISTILLED and sampling.guided:
            raise ConfigError(
                f"guidance_scale {guidance_scale} was asked with {chosen}, whose guidance is "
                "distilled into the model; leave it out or use 1"
            )
        if uses_learned_variance(chosen) and not self.config.learned_variance:
            raise ConfigError("iddpm needs a model with learned variance; use ddim")
        return sampling

    def _before(self, sampling: SamplingConfig) -> Callable[[int], None]:
        def check(step: int) -> None:
            if self._interrupted:
                raise Cancelled(f"stopped before step {step + 1} of {sampling.num_inference_steps}")

        return check

    def _after(self, callback: StepCallback | None) -> After | None:
        if callback is None:
            return None

        def after(
            step: int, timestep: Tensor, latents: list[Tensor], denoised: list[Tensor]
        ) -> list[Tensor]:
            batch = torch.cat(latents)
            tensors = {"latents": batch, "denoised": torch.cat(denoised)}
            new = (callback(self, step, timestep, tensors) or {}).get("latents", batch)
            return latents if new is batch else list(new.split(1))

        return after

    def _require_finite(self, images: Tensor, sampling: SamplingConfig) -> None:
        if not bool(images.isfinite().all()):
            raise NumericsError(
                f"an image came out with NaN or Inf ({self.manifest.model['name']}, "
                f"{sampling.scheduler}); run `pixart-rt verify` on the bundle"
            )

    def _decoder(self, tiling: bool | None = None) -> Component | TiledDecoder:
        if not (self.vae_tiling if tiling is None else tiling):
            return self.vae_decoder
        return TiledDecoder(self.vae_decoder, self.manifest.components["vae_decoder"].profiles)

    def _image(
        self, latents: Tensor, request: Request, sampling: SamplingConfig, output_type: str
    ) -> Any:
        image = latents if output_type == "latent" else self._decoder()(latents=latents)
        self._require_finite(image, sampling)
        finished = finish(image, request.height, request.width, output_type)
        return finished[0] if output_type == "pil" else finished

    def _rows(
        self,
        prompts: list[str] | None,
        negatives: list[str],
        guided: bool,
        given: Encoded | None,
        given_null: Encoded | None,
    ) -> list[_Row]:
        """A row per prompt: its text, its embeddings and, with guidance, its unconditional ones."""
        whole = Saving.SHORT_TEXT not in self.denoiser.savings
        texts: list[str | None] = []
        if given is not None:
            texts, encoded = [None] * len(given.embeds), given
        else:
            assert prompts is not None
            texts, encoded = [*prompts], self._encoder()(prompts, whole=whole)
        if not guided:
            return [_Row(text, encoded[i : i + 1], None, None) for i, text in enumerate(texts)]
        null = given_null
        if null is None:
            null = unconditional(
                self.config.cfg_null, encoded, negatives, self.prompt_encoder, self.y_embedding,
                whole=whole,
            )  # fmt: skip
        elif len(null.embeds) != len(encoded.embeds):
            raise ConfigError(
                f"{len(null.embeds)} negative prompt embeddings were given for "
                f"{len(encoded.embeds)} prompts; give one each"
            )
        # A name for the caches only where the embeddings depend on the text alone.
        alone = given_null is None and self.config.cfg_null is CfgNull.EMPTY_PROMPT
        names = [text if alone else None for text in negatives]
        return [
            _Row(text, encoded[i : i + 1], name, null[i : i + 1])
            for i, (text, name) in enumerate(zip(texts, names, strict=True))
        ]

    def _given(self, embeds: Tensor | None, mask: Tensor | None) -> Encoded | None:
        """Embeddings that the caller passed, checked, on the device; None if there are none."""
        if embeds is None:
            return None
        if mask is None or mask.shape != embeds.shape[:2]:
            raise ConfigError("prompt embeddings [B, T, C] need their attention mask [B, T]")
        expected = (self.config.max_text_tokens, self.config.caption_channels)
        if embeds.shape[1:] != expected:
            raise ConfigError(
                f"prompt embeddings are {tuple(embeds.shape)}, the model takes [B, "
                f"{expected[0]}, {expected[1]}]"
            )
        mask = mask.bool()
        counts = tuple(mask.sum(1).tolist())
        return Encoded(embeds.float().to(self.device), mask.to(self.device), counts)

    def _encoder(self) -> PromptEncoder:
        if self.prompt_encoder is None:
            raise BundleError(
                f"{self.folder} was built without text_encoder; pass prompt_embeds, or build again "
                "without --components"
            )
        return self.prompt_encoder


@dataclass(frozen=True, slots=True)
class _Row:
    """The text of an image, before its shape and seed; see `Item`."""

    text: str | None
    encoded: Encoded
    null_text: str | None
    null: Encoded | None

    def item(
        self, bucket: Bucket, seed: int, guidance_scale: float, control: Tensor | None
    ) -> Item:
        text, null = (self.text, self.encoded), (self.null_text, self.null)
        return Item(bucket, seed, guidance_scale, *text, *null, control)


def _text_key(manifest: Manifest) -> str:
    """What embeddings depend on but their text: the encoder's files, how its weights are kept when
    they are loaded, and where a prompt is cut.
    """
    files = sorted(manifest.components["text_encoder"].files.values())
    weights, longest = manifest.weights_of("text_encoder"), manifest.config.max_text_tokens
    return " ".join([*files, weights, str(longest)])


def _enum(name: str | Scheduler) -> Scheduler:
    try:
        return Scheduler(name)
    except ValueError:
        known = ", ".join(Scheduler)
        raise ConfigError(f"scheduler {name!r} is unknown; choose from {known}") from None


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + index for index in range(count)]
    if len(seed) != count:
        raise ConfigError(f"{len(seed)} seeds were given for {count} images; give one each")
    return list(seed)


def _per_prompt(text: str | Sequence[str], count: int) -> list[str]:
    if isinstance(text, str):
        return [text] * count
    if len(text) != count:
        raise ConfigError(f"{len(text)} negative prompts were given for {count} prompts")
    return list(text)


@contextmanager
def _reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's own progress, or a bar on stderr."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("warmup", total=None)
        yield lambda name, done, total: bar.update(
            task, description=name, completed=done, total=total
        )
