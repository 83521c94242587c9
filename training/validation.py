"""Validation images: fixed prompts and seeds, drawn by the weights as they are, as one grid.

    validation = Validation("PixArt-alpha/PixArt-XL-2-256x256", model.config, settings, device)
    validation(model, out, step)                         out/validation/step-<step>.png
    Trainer(..., validation=lambda weights, step: validation.of_weights(weights, out, step))

The text encoder runs once, when this is made, and is freed; the VAE waits on the CPU. No random
state but the images' own is touched, and no compiled block is compiled again: the model runs
eagerly here. `model` is whole, so a sharded one (FSDP) is gathered first; one rank draws.

B images, C latent channels, h×w latent pixels, T text tokens, E text width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pixart_rt.buckets import VAE_SCALE_FACTOR, Bucket, bucket_for_aspect
from pixart_rt.checkpoints.hub import locate
from pixart_rt.checkpoints.text_encoder import read_text_encoder
from pixart_rt.config import Kernels, ModelConfig, SamplingConfig, Scheduler
from pixart_rt.data.batch import Batch
from pixart_rt.errors import CheckpointError, ConfigError
from pixart_rt.inference.images import as_image, contact_sheet, write_png
from pixart_rt.inference.schedulers import make_scheduler, uses_learned_variance
from pixart_rt.model.tokenizer import PromptTokenizer
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, read_vae
from pixart_rt.training.dropout import drop_captions, null_text
from pixart_rt.training.objectives.denoising import Positions, predict_noise

FOLDERS = ("vae", "text_encoder", "tokenizer", "scheduler")
_MODEL = "model."  # what an objective calls its transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationSettings:
    """What is drawn: image k has prompt k and seed + k, the noise that the pipeline would take."""

    prompts: tuple[str, ...]
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    aspect_ratio: str = "1:1"  # width:height, of the model's own resolution
    batch: int = 4  # images drawn together
    columns: int | None = None  # of the grid; None: as square as can be

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError(
                "validation images were requested without a prompt; give at least one"
            )
        if self.batch < 1 or self.seed < 0 or (self.columns is not None and self.columns < 1):
            raise ConfigError(
                f"validation got batch {self.batch}, seed {self.seed}, columns {self.columns}; "
                "batch and columns are positive, seed is not negative"
            )
        if self.sampling.approximate is not None:
            raise ConfigError(
                f"validation is not supported with {self.sampling.approximate}; its images are "
                "those of all steps"
            )


class Validation:
    """Draws the images of one run.

    pipeline: tiny, a diffusers folder or a hub id, with VAE, text encoder, tokenizer and scheduler.
    config: the model that is trained. text_dtype: of the text encoder, by default bfloat16 on a GPU
    and float32 elsewhere. autocast: dtype of the model's products, as in training; None leaves them
    in the weights'. y_embedding [T, E]: the checkpoint's, for CfgNull.Y_EMBEDDING.
    bucket: a size beyond the tables, instead of the settings' aspect ratio.
    Raises CheckpointError where a part of the pipeline is missing or of another model.
    """

    def __init__(
        self,
        pipeline: str,
        config: ModelConfig,
        settings: ValidationSettings,
        device: torch.device,
        *,
        text_dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        y_embedding: Tensor | None = None,
        bucket: Bucket | None = None,
    ) -> None:
        if uses_learned_variance(settings.sampling.scheduler) and not config.learned_variance:
            raise ConfigError("iddpm is not supported for validation: the model learns no variance")
        folder = locate(pipeline, FOLDERS)
        missing = [name for name in FOLDERS[:3] if not (folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{pipeline} has no {', '.join(missing)}; validation images need a whole pipeline "
                "folder, as diffusers writes it, or tiny"
            )
        self.config, self.settings, self.device, self.autocast = config, settings, device, autocast
        self.bucket = bucket or bucket_for_aspect(config.resolution, settings.aspect_ratio)
        self.positions = Positions(config)
        self._scheduler = folder / "scheduler"
        dtype = text_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._text, self._null = _encode(folder, config, settings, device, dtype, y_embedding)
        self._decoder = VaeDecoder(read_vae(folder / "vae")).use(Kernels.REFERENCE)

    def __call__(self, model: PixArtTransformer, out: Path, step: int) -> Path:
        """Write the grid of `model` after `step` steps; a file of the same step is replaced."""
        images = self.images(model)
        captions = [
            prompt if bool(image.isfinite().all()) else f"{prompt} (not finite)"
            for prompt, image in zip(self.settings.prompts, images, strict=True)
        ]
        sheet = contact_sheet(
            [as_image(image.nan_to_num()) for image in images],
            captions,
            columns=self.settings.columns,
        )
        path = Path(out) / "validation" / f"step-{step}.png"
        sampling = self.settings.sampling
        metadata = {
            "step": step,
            "prompts": json.dumps(self.settings.prompts, ensure_ascii=False),
            "seed": self.settings.seed,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "scheduler": sampling.scheduler,
        }
        return write_png(sheet, path, metadata, force=True)

    def of_weights(self, weights: Mapping[str, Tensor], out: Path, step: int) -> Path:
        """The same of a TextObjective's whole weights by their names, as the trainer gives them.

        They are copied to the device for as long as it takes.
        """
        with torch.device("meta"):
            model = PixArtTransformer(self.config)
        state = {
            name.removeprefix(_MODEL): each
            for name, each in weights.items()
            if name.startswith(_MODEL)
        }
        model.load_state_dict(state, assign=True)
        return self(model.to(self.device), out, step)

    @torch.no_grad()
    def images(self, model: PixArtTransformer) -> Tensor:
        """[B, 3, H, W] float32 in 0..1 on the CPU, an image for each prompt in order."""
        was_training = model.training
        model.eval()
        self._decoder.to(self.device)
        try:
            with torch.compiler.set_stance("force_eager"):
                count, batch = len(self.settings.prompts), self.settings.batch
                drawn = [
                    self._draw(model, range(start, min(start + batch, count)))
                    for start in range(0, count, batch)
                ]
        finally:
            model.train(was_training)
            self._decoder.to("cpu")
        return torch.cat(drawn)

    def _draw(self, model: PixArtTransformer, rows: range) -> Tensor:
        seeds = [self.settings.seed + row for row in rows]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        height, width = self.bucket.height, self.bucket.width
        shape = (1, self.config.in_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
        noise = torch.cat([torch.randn(shape, generator=each) for each in generators])
        latents = self._denoise(model, noise.to(self.device), rows, generators)
        return (self._decoder(latents) / 2 + 0.5).clamp(0, 1).float().cpu()

    def _denoise(
        self,
        model: PixArtTransformer,
        latents: Tensor,
        rows: range,
        generators: list[torch.Generator],
    ) -> Tensor:
        """Noise [B, C, h, w] to latents of the same shape, as the pipeline does it."""
        sampling = self.settings.sampling
        solver = make_scheduler(sampling.scheduler, self._scheduler)
        solver.set_timesteps(sampling.num_inference_steps, device="cpu")
        extra = {} if sampling.scheduler is Scheduler.DPM_SOLVER else {"generator": generators}
        latents = latents * solver.init_noise_sigma
        plain = self._batch(self._text, rows)
        null = None if self._null is None else self._batch(self._null, rows)
        for index, timestep in enumerate(solver.timesteps):
            scaled = solver.scale_model_input(latents, timestep)
            noise = self._predict(model, scaled, timestep, plain)
            if null is not None and sampling.guides(index):
                noise = self._guided(noise, self._predict(model, scaled, timestep, null))
            if not uses_learned_variance(sampling.scheduler):
                noise = noise[:, : self.config.in_channels]
            latents = solver.step(noise, timestep, latents, **extra, return_dict=False)[0]
        return latents

    def _guided(self, noise: Tensor, null: Tensor) -> Tensor:
        """Classifier-free guidance on the noise; the variance is the conditional half's."""
        C, scale = self.config.in_channels, self.settings.sampling.guidance_scale
        guided = null[:, :C] + scale * (noise[:, :C] - null[:, :C])
        return torch.cat([guided, noise[:, C:]], dim=1)

    def _predict(
        self, model: PixArtTransformer, latents: Tensor, timestep: Tensor, batch: Batch
    ) -> Tensor:
        """[B, C, h, w] at one timestep [] to [B, C or 2C, h, w] float32."""
        t = torch.full((len(latents),), float(timestep), device=self.device)
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with autocast:
            noise = predict_noise(
                model, self.positions, latents, t, batch.prompt_embeds, batch.prompt_mask, batch
            )
        return noise.float()

    def _batch(self, text: tuple[Tensor, Tensor], rows: range) -> Batch:
        """Text and sizes of some images; sizes are the bucket's own, as when images are made."""
        count = len(rows)
        embeds, mask = (each[rows.start : rows.stop] for each in text)
        size = torch.tensor([[self.bucket.height, self.bucket.width]], dtype=torch.float32)
        ratio = torch.tensor([[self.bucket.height / self.bucket.width]])
        return Batch(
            ids=torch.arange(rows.start, rows.stop),
            latents=torch.empty(0),
            prompt_embeds=embeds,
            prompt_mask=mask,
            original_size=size.expand(count, 2),
            aspect_ratio=ratio.expand(count, 1),
            bucket=self.bucket,
        ).to(self.device)


def _encode(
    folder: Path,
    config: ModelConfig,
    settings: ValidationSettings,
    device: torch.device,
    dtype: torch.dtype,
    y_embedding: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Embeddings [B, T, E] float32 and masks [B, T] of the prompts and, with guidance, their nulls.

    On the CPU; the text encoder is gone when this returns.
    """
    tokens = PromptTokenizer(folder / "tokenizer", config.max_text_tokens)([*settings.prompts, ""])
    encoder = read_text_encoder(folder / "text_encoder", dtype).to(device)
    if encoder.config.d_model != config.caption_channels:
        raise CheckpointError(
            f"the text encoder in {folder} is {encoder.config.d_model} wide, the model takes "
            f"{config.caption_channels} (caption_channels); they are of different models"
        )
    with torch.no_grad():
        embeds = torch.cat([
            encoder(ids[None].to(device), mask[None].to(device)).cpu()
            for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)
        ])  # fmt: skip
    masks = tokens.attention_mask.bool()
    text = embeds[:-1], masks[:-1]
    if not settings.sampling.guided:
        return text, None
    null = null_text(config.cfg_null, empty_prompt=(embeds[-1], masks[-1]), y_embedding=y_embedding)
    everything = torch.ones(len(masks) - 1, dtype=torch.bool)
    return text, drop_captions(*text, everything, null)
