"""Prompt to images: encode, plan, denoise, decode. Owns the loop, knows no backend.

B images of a batch, C latent channels, h×w latent pixels, N tokens. Latents, guidance and solver
are float32 whatever the engines' precision. Argument names are those of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import PixArtImageProcessor
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from pixart_rt.backends import default_device, get_backend
from pixart_rt.backends.base import Component
from pixart_rt.buckets import Bucket, choose_bucket
from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.config import CfgNull, Precision, Quality, SamplingConfig, Scheduler
from pixart_rt.errors import BundleError, Cancelled, ConfigError, NumericsError
from pixart_rt.model.captions import PromptTokenizer
from pixart_rt.model.conditioning import patchify, unpatchify
from pixart_rt.plan import load_modulator, make_plan
from pixart_rt.preview import ColourPreview, Previewer, TinyPreview, to_pictures
from pixart_rt.prompts import Encoded, PromptEncoder, unconditional
from pixart_rt.schedulers import make_scheduler, uses_learned_variance
from pixart_rt.tiling import TiledDecoder

VAE_SCALE_FACTOR = 8  # pixels per latent pixel
DTYPES = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
}
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


class _Placed:
    """A component whose inputs are brought to its device: not every backend uses the GPU."""

    def __init__(self, component: Component, device: torch.device) -> None:
        self.component, self.device = component, device

    def __call__(self, **inputs: Tensor) -> Tensor:
        return self.component(**{name: tensor.to(self.device) for name, tensor in inputs.items()})


class PixArtPipeline:
    """Makes images from a bundle of engines. One instance serves one thread."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        components: dict[str, Component],
        device: torch.device,
    ) -> None:
        self.manifest, self.folder, self.device = manifest, Path(folder), device
        self.config = manifest.config
        self.resolution = int(manifest.engine_config["resolution"])
        self.max_batch = int(manifest.engine_config["max_batch"])
        self.quality = manifest.quality
        self._lossless = None
        if self.quality is Quality.LOSSLESS:
            self._lossless = DTYPES[Precision(manifest.components["transformer"].precision)]
        self.transformer = components["transformer"]
        self.vae_decoder = components["vae_decoder"]
        self.modulator = load_modulator(self.folder / "modulator.safetensors", self.config)
        self.prompt_encoder: PromptEncoder | None = None
        if "text_encoder" in components:
            self.prompt_encoder = PromptEncoder(
                PromptTokenizer(self.folder / "tokenizer", self.config.max_text_tokens),
                components["text_encoder"],
                device,
                2 * self.max_batch,
            )
        self.y_embedding: Tensor | None = None
        if self.config.cfg_null is CfgNull.Y_EMBEDDING:
            path = self.folder / "y_embedding.safetensors"
            if path.is_file():
                self.y_embedding = load_file(path)["y_embedding"].float().to(device)
        self._previewer: Previewer | None = None  # the bundle's own, read when first asked
        self._interrupted = False

    @classmethod
    def from_bundle(
        cls, path: str | Path, device: str | torch.device | None = None, *, check: bool = True
    ) -> PixArtPipeline:
        """Load a bundle; by default each component on the GPU if its backend can use one.

        check: compare every file with its hash first (about a second per GB). Raises BundleError
        for a bundle that is damaged or lacks a component, BackendError where it cannot run.
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
        for name, entry in manifest.components.items():
            places[name] = torch.device(device or default_device(entry.backend))
            loaded = get_backend(entry.backend).load(path, manifest, name, places[name])
            components[name] = _Placed(loaded, places[name])
        return cls(manifest, path, components, places["transformer"])

    def interrupt(self) -> None:
        """Stop the image in work: its call raises Cancelled before the next step."""
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
        num_inference_steps: int = 20,
        guidance_scale: float | None = None,
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
        vae_tiling: bool = False,
    ) -> PipelineOutput:
        """Make `num_images_per_prompt` images of every prompt.

        guidance_scale: 4.5 by default; 1 or less runs without the unconditional half, as LCM
            does by default.
        aspect_ratio: "W:H", the nearest of the 40 trained buckets; or height and width in pixels,
            made at the nearest bucket, then resized and centre-cropped.
        seed: image k (prompts in order, each with its images) draws from seed + k, or from
            seed[k]; the same seed gives the same noise on any device and at any batch position.
        prompt_embeds [B, T, C] and prompt_attention_mask [B, T] replace the prompt, and likewise
            the negative ones.
        scheduler: one of Scheduler; by default the checkpoint's own, DPM-Solver++ or LCM.
        callback_on_step_end(pipe, step, timestep, {"latents": ..., "denoised": ...}) may return
            new latents; `denoised` is the step's estimate of the final ones, which `preview`
            shows. Images are made `max_batch` at a time; each batch calls it for every step.
        output_type: "pil", "np", "pt" or "latent".
        vae_tiling: decode in overlapping tiles, one at a time: less memory, almost the same image.
        The loop waits for the device nowhere; samplers that add noise (SA-Solver, iDDPM, LCM) draw
        it on the CPU and copy it. The finished images are checked once for NaN.
        Raises ConfigError for impossible arguments, Cancelled after `interrupt`, NumericsError
        for an image that is not finite.
        """
        self._interrupted = False
        chosen = _enum(scheduler or self.manifest.scheduler)
        if guidance_scale is None:
            guidance_scale = 1.0 if chosen is Scheduler.LCM else 4.5
        sampling = SamplingConfig(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, scheduler=chosen
        )
        self._check(sampling, output_type)
        bucket = choose_bucket(self.resolution, aspect_ratio, height, width)
        texts, encoded, null = self._encode(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            sampling.guided,
            self._given(prompt_embeds, prompt_attention_mask),
            self._given(negative_prompt_embeds, negative_prompt_attention_mask),
        )
        seeds = _seeds(seed, len(texts))
        profiles = self.manifest.components["vae_decoder"].profiles
        decode = TiledDecoder(self.vae_decoder, profiles) if vae_tiling else self.vae_decoder
        images = []
        for start in range(0, len(texts), self.max_batch):
            rows = slice(start, start + self.max_batch)
            latents = self._denoise(
                encoded[rows],
                null[rows] if null is not None else None,
                bucket,
                seeds[rows],
                sampling,
                callback_on_step_end,
            )
            images.append(latents if output_type == "latent" else decode(latents=latents))
        whole = torch.cat(images)
        if not bool(whole.isfinite().all()):
            raise NumericsError(
                f"an image came out with NaN or Inf ({self.manifest.model['name']}, "
                f"{sampling.scheduler}); run `pixart-rt verify` on the bundle"
            )
        finished = _finish(whole, height, width, output_type)
        return PipelineOutput(images=finished, prompts=texts, seeds=seeds, bucket=bucket)

    def _check(self, sampling: SamplingConfig, output_type: str) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type {output_type!r} is not one of pil, np, pt, latent")
        if sampling.scheduler is Scheduler.LCM and sampling.guided:
            raise ConfigError(
                f"guidance_scale {sampling.guidance_scale} was asked with LCM, whose guidance is "
                "distilled into the model; leave it out or use 1"
            )
        if uses_learned_variance(sampling.scheduler) and not self.config.learned_variance:
            raise ConfigError("iddpm needs a model with learned variance; use ddim")

    def _encode(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str],
        copies: int,
        guided: bool,
        given: Encoded | None,
        given_null: Encoded | None,
    ) -> tuple[list[str], Encoded, Encoded | None]:
        """A row per image: its text, its embeddings and, with guidance, its unconditional ones."""
        if (prompt is None) == (given is None):
            raise ConfigError("give prompt or prompt_embeds with its mask, one of the two")
        if copies < 1:
            raise ConfigError(f"num_images_per_prompt must be at least 1, got {copies}")
        if given is not None:
            prompts, encoded = [""] * len(given.embeds), given
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            if not prompts:
                raise ConfigError("the list of prompts is empty")
            encoded = self._encoder()(prompts)
        negatives = _per_prompt(negative_prompt, len(prompts))
        null = None
        if guided and given_null is not None:
            null = given_null
            if len(null.embeds) != len(encoded.embeds):
                raise ConfigError(
                    f"{len(null.embeds)} negative prompt embeddings were given for "
                    f"{len(encoded.embeds)} prompts; give one each"
                )
        elif guided:
            null = unconditional(
                self.config.cfg_null, encoded, negatives, self.prompt_encoder, self.y_embedding
            )
        texts = [text for text in prompts for _ in range(copies)]
        return texts, _repeat(encoded, copies), None if null is None else _repeat(null, copies)

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
        return Encoded(embeds.float().to(self.device), mask.bool().to(self.device))

    def _encoder(self) -> PromptEncoder:
        if self.prompt_encoder is None:
            raise BundleError(
                f"{self.folder} was built without text_encoder; pass prompt_embeds, or build again "
                "without --components"
            )
        return self.prompt_encoder

    def _denoise(
        self,
        encoded: Encoded,
        null: Encoded | None,
        bucket: Bucket,
        seeds: list[int],
        sampling: SamplingConfig,
        callback: StepCallback | None,
    ) -> Tensor:
        """The sampling loop: noise from the seeds to latents [B, C, h, w]."""
        solver = make_scheduler(sampling.scheduler, self.folder / "scheduler")
        solver.set_timesteps(sampling.num_inference_steps, device="cpu")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = self._noise(generators, bucket) * float(solver.init_noise_sigma)
        plan = make_plan(
            self.modulator, self.config, bucket, solver.timesteps, self.device, self._lossless
        )
        text = encoded if null is None else Encoded.cat([null, encoded])
        stochastic = sampling.scheduler is not Scheduler.DPM_SOLVER
        extra = {"generator": generators} if stochastic else {}
        for step, timestep in enumerate(solver.timesteps):
            if self._interrupted:
                raise Cancelled(f"stopped before step {step + 1} of {len(solver.timesteps)}")
            scaled = solver.scale_model_input(latents, timestep)
            noise = self._predict(scaled, plan.pos_embed, plan.modulation[step], text, bucket)
            noise = self._guide(noise, null is not None, sampling)
            latents, *rest = solver.step(noise, timestep, latents, **extra, return_dict=False)
            if callback is not None:
                denoised = rest[0] if rest else solver.model_outputs[-1]
                tensors = {"latents": latents, "denoised": denoised}
                changed = callback(self, step, timestep, tensors) or {}
                latents = changed.get("latents", latents)
        return latents

    def _noise(self, generators: list[torch.Generator], bucket: Bucket) -> Tensor:
        shape = (
            1,
            self.config.in_channels,
            bucket.height // VAE_SCALE_FACTOR,
            bucket.width // VAE_SCALE_FACTOR,
        )
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        return torch.cat(noise).to(self.device)

    def _predict(
        self, latents: Tensor, pos_embed: Tensor, modulation: Tensor, text: Encoded, bucket: Bucket
    ) -> Tensor:
        """One call of the transformer, both halves of guidance in one batch."""
        tokens = patchify(latents, self.config.patch_size)
        rows = len(text.embeds)
        if rows != len(tokens):
            tokens = torch.cat([tokens, tokens])
        noise = self.transformer(
            tokens=tokens,
            pos_embed=pos_embed,
            modulation=modulation.expand(rows, -1, -1),
            prompt_embeds=text.embeds,
            prompt_mask=text.mask,
        )
        return unpatchify(noise, bucket.grid, self.config.patch_size)

    def _guide(self, noise: Tensor, guided: bool, sampling: SamplingConfig) -> Tensor:
        """Classifier-free guidance on the noise; a learned variance is the conditional half's."""
        variance = noise[:, self.config.in_channels :]
        noise = noise[:, : self.config.in_channels]
        if guided:
            null, cond = noise.chunk(2)
            noise = null + sampling.guidance_scale * (cond - null)
            variance = variance.chunk(2)[1]
        if uses_learned_variance(sampling.scheduler):
            return torch.cat([noise, variance], dim=1)
        return noise


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


def _repeat(encoded: Encoded, copies: int) -> Encoded:
    return Encoded(
        encoded.embeds.repeat_interleave(copies, 0), encoded.mask.repeat_interleave(copies, 0)
    )


def _finish(images: Tensor, height: int | None, width: int | None, output_type: str) -> Any:
    """Resize and crop to the asked size, then to the asked form, with diffusers' own code."""
    if output_type == "latent":
        return images
    processor = PixArtImageProcessor(vae_scale_factor=VAE_SCALE_FACTOR)
    if height is not None and width is not None and images.shape[-2:] != (height, width):
        images = processor.resize_and_crop_tensor(images, width, height)
    return processor.postprocess(images, output_type=output_type)
