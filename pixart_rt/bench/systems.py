"""Ours and the peers behind one call: prompts and seeds in, PIL images and seconds out.

A system makes images of the bundle's bucket, with the request's steps and guidance. The noise of
image k comes from its own seed, drawn in float32 on the CPU inside the measured time, so that all
systems begin from the same latents.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch

from pixart_rt.bench.request import BenchRequest, Prompts, transformer_folder
from pixart_rt.bench.stages import STEP, TEXT, VAE, Stages
from pixart_rt.buckets import VAE_SCALE_FACTOR, bucket_for_aspect
from pixart_rt.bundle import Manifest
from pixart_rt.config import Precision
from pixart_rt.inference.pipeline import PixArtPipeline
from pixart_rt.kernels.launch import refused_lines
from pixart_rt.model.dtypes import DTYPES

OURS = "pixart_rt"
LATE = 1000  # the number of a prompt that is as long as any


class System(Protocol):
    """Something that makes images."""

    name: str
    device: torch.device

    def prepare(self, batch: int) -> None:
        """Do what a user does once before the first request of this size, if there is anything."""
        ...

    def __call__(self, prompts: list[str], seeds: list[int]) -> tuple[list[Any], dict[str, Any]]:
        """The images [PIL] and the seconds of `Stages.measure`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What it runs with: backends, precisions, compiler."""
        ...


def load_system(name: str, request: BenchRequest) -> System:
    """The system of that name, loaded."""
    if name == OURS:
        return Ours(request)
    return Diffusers(request, compiled=name == "diffusers-compile")


class Ours:
    """A bundle's pipeline."""

    name = OURS

    def __init__(self, request: BenchRequest) -> None:
        self.pipe = pipe = PixArtPipeline.from_bundle(request.bundle)
        self.device, self.request = pipe.device, request
        assert pipe.prompt_encoder is not None
        self.stages = Stages(self.device)
        self.stages.watch(pipe.prompt_encoder, "embed", TEXT)  # also where a graph replays
        self.stages.watch(pipe, "transformer", STEP)
        self.stages.watch(pipe, "vae_decoder", VAE)

    def prepare(self, batch: int) -> None:
        """`pipe.warmup`, which captures CUDA graphs where there can be any."""
        texts = Prompts(self.request.prompt)
        self.pipe.warmup(
            [self.request.aspect_ratio],
            batch_size=batch,
            num_inference_steps=self.request.steps,
            guidance_scale=self.request.guidance_scale,
            prompts=[texts.text(1), texts.text(LATE)],
            progress=lambda _what, _done, _total: None,
        )

    def __call__(self, prompts: list[str], seeds: list[int]) -> tuple[list[Any], dict[str, Any]]:
        result, seconds = self.stages.measure(
            lambda: self.pipe(
                prompts,
                num_inference_steps=self.request.steps,
                guidance_scale=self.request.guidance_scale,
                aspect_ratio=self.request.aspect_ratio,
                seed=seeds,
            )
        )
        return result.images, seconds

    def facts(self) -> dict[str, Any]:
        components = self.pipe.manifest.components
        return {
            "backends": {name: entry.backend for name, entry in components.items()},
            "precisions": {name: entry.precision for name, entry in components.items()},
            "quality": str(self.pipe.quality),
            "refused_kernels": refused_lines(),
        }


class Diffusers:
    """diffusers' own pipeline with the same weights, in the precision of the bundle's transformer.

    compiled: transformer and VAE decoder through torch.compile, static shapes, whole graphs; on a
    GPU in mode max-autotune, which captures CUDA graphs.
    """

    def __init__(self, request: BenchRequest, *, compiled: bool) -> None:
        assert request.peer_model is not None, "BenchRequest.checked finds it"
        self.name = "diffusers-compile" if compiled else "diffusers"
        self.request, self.compiled = request, compiled
        manifest = Manifest.read(request.bundle)
        self.precision = manifest.components["transformer"].precision
        self.config = manifest.config
        self.bucket = bucket_for_aspect(
            int(manifest.engine_config["resolution"]), request.aspect_ratio
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = load_pipeline(
            request.peer_model, transformer_folder(manifest), DTYPES[Precision(self.precision)]
        ).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.mode = "max-autotune" if self.device.type == "cuda" else "default"
        if compiled:
            for module in (self.pipe.transformer, self.pipe.vae.decoder):
                module.forward = torch.compile(
                    module.forward, mode=self.mode, fullgraph=True, dynamic=False
                )
        self.stages = Stages(self.device)
        self.stages.watch(self.pipe.text_encoder, "forward", TEXT)
        self.stages.watch(self.pipe.transformer, "forward", STEP)
        self.stages.watch(self.pipe.vae, "decode", VAE)

    def prepare(self, batch: int) -> None:
        """Nothing: torch.compile works in the first call."""

    def __call__(self, prompts: list[str], seeds: list[int]) -> tuple[list[Any], dict[str, Any]]:
        with torch.inference_mode():
            result, seconds = self.stages.measure(lambda: self._images(prompts, seeds))
        return result, seconds

    def _images(self, prompts: list[str], seeds: list[int]) -> list[Any]:
        images: list[Any] = self.pipe(
            prompts,
            num_inference_steps=self.request.steps,
            guidance_scale=self.request.guidance_scale,
            height=self.bucket.height,
            width=self.bucket.width,
            latents=self._noise(seeds),
            clean_caption=True,  # as ours always does
            use_resolution_binning=False,  # the size is a trained one; its table lacks seven of 40
            max_sequence_length=self.config.max_text_tokens,
        ).images
        return images

    def _noise(self, seeds: list[int]) -> torch.Tensor:
        shape = (
            1,
            self.config.in_channels,
            self.bucket.height // VAE_SCALE_FACTOR,
            self.bucket.width // VAE_SCALE_FACTOR,
        )
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.cat(noise).to(self.device, DTYPES[Precision(self.precision)])

    def facts(self) -> dict[str, Any]:
        return {
            "pipeline": type(self.pipe).__name__,
            "precisions": dict.fromkeys(("text_encoder", "transformer", "vae_decoder"),
                                        str(self.precision)),
            "compiled": ["transformer", "vae_decoder"] if self.compiled else [],
            "compile_mode": self.mode if self.compiled else None,
        }  # fmt: skip


def load_pipeline(folder: Path, transformer: str, dtype: torch.dtype) -> Any:
    """The pipeline that `folder` names in its index, with that subfolder's transformer."""
    import diffusers

    parts = {}
    if transformer != "transformer":
        parts["transformer"] = diffusers.PixArtTransformer2DModel.from_pretrained(
            folder, subfolder=transformer, torch_dtype=dtype
        )
    with warnings.catch_warnings():  # the one name that 0.36 and 0.42 both take, until 1.0
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **parts)
