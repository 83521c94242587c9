"""Prompt to images: the public face of inference. Knows no backend.

Request (request.py) -> batches (batching.py) -> denoiser (denoiser.py) -> images (decoding.py), in
the order of generation.py.
Latents, guidance and solver are float32 whatever the engines' precision. Argument names are those
of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from pixart_rt.approximations import Approximation, StepCache
from pixart_rt.backends.component import Component
from pixart_rt.backends.loading import Loader
from pixart_rt.buckets import Bucket
from pixart_rt.bundle import Manifest
from pixart_rt.config import Precision, Scheduler, TextPlace
from pixart_rt.errors import ConfigError
from pixart_rt.inference.bundle_components import (
    load_components,
    make_denoiser,
    make_prompt_encoder,
    read_manifest,
)
from pixart_rt.inference.call_arguments import call_requests, check_output_type, check_requests
from pixart_rt.inference.call_state import Call, Progress, Turns
from pixart_rt.inference.control import ControlImage, Controls
from pixart_rt.inference.from_pretrained import find_or_build
from pixart_rt.inference.generation import (
    ImageResult,
    PipelineOutput,
    StepCallback,
    Work,
    in_order,
    make,
    output,
    work_alike,
    work_each,
)
from pixart_rt.inference.preview import ColourPreview, Previewer, TinyPreview, to_pictures
from pixart_rt.inference.request import DEFAULT_SEED, Request
from pixart_rt.inference.request_text import RequestText
from pixart_rt.inference.warm_up import WARMUP_PROMPTS, one_of_each_token_count, warm_up


class PixArtPipeline:
    """Makes images from a bundle of engines.

    Threads may share it: calls take turns, in no order that is promised. A call's state is its
    own, so none sees another's cancel, callback or skipped steps. Attributes (`vae_tiling`,
    `transformer`, `denoiser.savings`) are for all calls; change them between calls.

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
        self.prompt_encoder = make_prompt_encoder(
            manifest, self.folder, components.get("text_encoder"), device, prompt_cache
        )
        self.denoiser = make_denoiser(manifest, self.folder, components["transformer"], device)
        self.controls = Controls(manifest, self.folder, device)
        self.request_text = RequestText(self.config, self.folder, self.prompt_encoder, device)
        self._previewer: Previewer | None = None  # the bundle's own, read when first asked
        self._turns = Turns()
        self.auto_capture = auto_capture

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
        """True where a second batch of one shape, without a callback, is captured."""
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
        manifest = read_manifest(path, check=check)
        loader = Loader(text_place, cuda_graphs=cuda_graphs)
        components, place = load_components(path, manifest, device, loader)
        cache = None if prompt_cache is None else Path(prompt_cache)
        return cls(manifest, path, components, place, cache, auto_capture=auto_capture)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        *,
        backend: str = "auto",
        res: int | None = None,
        precision: Precision | str | None = None,
        max_batch: int = 1,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        prompt_cache: str | Path | None = None,
        text_place: TextPlace | None = None,
        cuda_graphs: bool = False,
        auto_capture: bool = True,
    ) -> PixArtPipeline:
        """Load a checkpoint's bundle from the user's cache; build it there the first time.

        model: "tiny", a diffusers pipeline folder or a Hugging Face id.
        backend: as of `pixart-rt build`; "auto" takes the best that works here.
        res: pixels per side; by default the model's own, 1024 for tiny.
        precision: of all components; by default the backend's, on a CPU float32.
        cache_dir: instead of $XDG_CACHE_HOME/pixart_rt/bundles (~/.cache by default). A bundle has
            the size of the weights in its precision; remove folders there as you like.
        progress(name, done, total) is told of the build's steps. The other arguments are those of
        `from_bundle`. Building takes the exporter's time and its packages: onnx for ONNX Runtime.
        Raises what `build` and `from_bundle` do.
        """
        bundle = find_or_build(
            model, backend=backend, res=res, precision=precision, max_batch=max_batch,
            device=device, cache_dir=cache_dir, progress=progress,
        )  # fmt: skip
        return cls.from_bundle(
            bundle,
            device,
            check=False,  # as `build` has, file by file
            prompt_cache=prompt_cache,
            text_place=text_place,
            cuda_graphs=cuda_graphs,
            auto_capture=auto_capture,
        )

    def to(self, device: str | torch.device) -> PixArtPipeline:
        """Itself, where it is on `device` already.

        Raises ConfigError for another: engines run where they were loaded.
        """
        try:
            asked = torch.device(device)
        except (RuntimeError, TypeError):
            raise ConfigError(
                f"to() takes a device such as 'cuda:0', got {device!r}; the precision is the "
                "bundle's: build another, or pass precision to from_pretrained"
            ) from None
        indices = {asked.index, self.device.index} - {None}  # None: the current one
        if asked.type == self.device.type and len(indices) < 2:
            return self
        raise ConfigError(
            f"to({str(asked)!r}) was requested of a pipeline on {self.device}, whose engines run "
            "where they were loaded; load it there: "
            f"PixArtPipeline.from_bundle({str(self.folder)!r}, device={str(asked)!r})"
        )

    def interrupt(self) -> None:
        """Stop the call that has the turn, from any thread or its own callback: it raises Cancelled
        before its next step (its next batch, where a CUDA graph replays all steps), at the latest
        instead of returning.

        Calls that wait for their turn, or come later, are not affected, and without a call this
        does nothing. To stop one call of several, or one that may not have begun, pass a
        `threading.Event` as its `cancel` and set that.
        """
        self._turns.interrupt()

    def preview(self, latents: Tensor, size: int | None = None) -> list[Image]:
        """Small pictures of latents [B, C, h, w], such as a step's callback is given.

        size: the longest side in pixels; by default that of the latents, or with a preview decoder
            the image's.
        Raises BundleError for a bundle that was built without previews.
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
        negative_prompt: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        aspect_ratio: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = DEFAULT_SEED,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        scheduler: str | Scheduler | None = None,
        force_scheduler: bool = False,
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
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> PipelineOutput:
        """Make `num_images_per_prompt` images of every prompt.

        num_inference_steps: by default the bundle's own, else 20; 4 with LCM and 1 with DMD.
        guidance_scale: by default the bundle's own, else 4.5; 1 or less runs without the
            unconditional half, as LCM and DMD do by default.
        guidance_interval: the part of the steps that is guided, all by default; the others run
            without the unconditional half, at half the cost, and make another image.
        aspect_ratio: "W:H", the nearest of the 40 trained buckets; or height and width in pixels,
            made at the nearest bucket, then resized and centre-cropped.
        seed: image k (prompts in order, each with its images) draws from seed + k, or from
            seed[k]; the same seed gives the same noise on any device and at any batch position.
            None draws a seed for each; the output says which.
        generator: as in diffusers, instead of a seed: one from which all images draw in turn, or
            one for each. A sampler that adds noise draws it for one batch after the other.
        prompt_embeds [B, T, C] and prompt_attention_mask [B, T] replace the prompt, and likewise
            the negative ones.
        scheduler: one of Scheduler; by default the checkpoint's own, DPM-Solver++ or LCM. LCM and
            DMD on weights that were not trained for them, and others on weights that were, are
            refused without force_scheduler.
        approximate: reuse earlier steps, for another image at less work (approximations.py); the
            output says which steps were skipped. With FirstBlockCache the host waits for the
            device once a step, and a step is skipped only where the whole batch allows it.
        callback_on_step_end(pipe, step, timestep, {"latents": ..., "denoised": ...}) may return
            new latents, or change those in place; `denoised` is the step's estimate of the final
            ones, which `preview` shows. Images are made `max_batch` at a time; each batch calls it
            for every step. Without one a batch replays its CUDA graph, if `warmup` or an earlier
            batch of the same shape captured one (see `auto_capture`).
        progress(name, done, total) is told of steps, or with a CUDA graph of batches.
        output_type: "pil", "np", "pt" or "latent".
        control_image: for a bundle with a ControlNet, and only for one: a picture of edges, or one
            for each image, scaled and centre-cropped to the bucket; or control_latents
            [1 or images, C, h, w] of such pictures, times the VAE's scaling factor.
        vae_tiling: decode in overlapping tiles, one at a time: less memory, almost the same image.
            By default as the bundle was built.
        cancel: stops this call once it is set; see `interrupt`.
        The loop waits for the device nowhere; samplers that add noise (SA-Solver, iDDPM, LCM) draw
        it on the CPU and copy it. A batch's finished images are checked for NaN.
        Raises ConfigError for impossible arguments, Cancelled for a call that was stopped,
        NumericsError for an image that is not finite.
        """
        check_output_type(output_type)
        requests = call_requests(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            generator=generator,
            embeds={
                "prompt_embeds": prompt_embeds,
                "prompt_attention_mask": prompt_attention_mask,
                "negative_prompt_embeds": negative_prompt_embeds,
                "negative_prompt_attention_mask": negative_prompt_attention_mask,
            },
            control_image=control_image,
            control_latents=control_latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            scheduler=scheduler,
            force_scheduler=force_scheduler,
            approximate=approximate,
            aspect_ratio=aspect_ratio,
            height=height,
            width=width,
        )
        work = work_alike(self, requests, output_type, callback=callback_on_step_end,
                          vae_tiling=vae_tiling)  # fmt: skip
        return output(self._at_once(work, Call(cancel, progress), fail_fast=True), output_type)

    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        scheduler: str | Scheduler | None = None,
        force_scheduler: bool | None = None,
        approximate: Approximation | None = None,
        output_type: str = "pil",
        vae_tiling: bool | None = None,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> list[Any]:
        """Many images at once, each with its own prompt, seed, settings and shape.

        The settings here are for requests that leave theirs out. With DPM-Solver++ images of equal
        token counts share a batch of at most `max_batch` whatever their shapes: 8 of the 40 shapes
        of 1024 px have 3840 tokens. With other samplers, and with a step cache, images of one
        shape do; with a first-block cache an image is alone. An image does not depend on its
        batch, beyond sums in another order: in float32 its latents agree to 1e-4 of their norm.
        Prompts of several batches are encoded together, the short ones apart from the long.
        progress, cancel: as in a call. A request's `seed` says what it drew from.
        Returns an image per request in their order: PIL, or with output_type "np", "pt" or
        "latent" an array or tensor [1, ...]. In place of an image that is not finite stands its
        NumericsError, with a warning; it is raised where no image came. Raises else as a call does.
        """
        settings = {
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval, "scheduler": scheduler,
            "force_scheduler": force_scheduler, "approximate": approximate,
        }  # fmt: skip
        work = self._work(requests, settings, output_type, vae_tiling=vae_tiling)
        return in_order(self._at_once(work, Call(cancel, progress), fail_fast=False))

    def stream(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        scheduler: str | Scheduler | None = None,
        force_scheduler: bool | None = None,
        approximate: Approximation | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pil",
        vae_tiling: bool | None = None,
        progress: Progress | None = None,
        cancel: Event | None = None,
    ) -> Iterator[ImageResult]:
        """The images of `generate_many`, each as soon as its batch is finished.

        Batches come in the order of their first requests, and within a batch the images in the
        order of theirs; `index` says which request it is. Requests of equal settings and shape
        thus come in their own order. An image that is not finite has an `error`; the others come.
        Arguments are checked here, before the first image is asked for. The pipeline is held for
        one batch at a time: between images others, and the loop over them, may call it, and
        `interrupt` stops a stream only while a batch runs; `cancel` stops it at any time. A stream
        that is left early leaves nothing behind.
        callback_on_step_end: as in a call; with one, images of one shape share a batch.
        """
        settings = {
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval, "scheduler": scheduler,
            "force_scheduler": force_scheduler, "approximate": approximate,
        }  # fmt: skip
        work = self._work(requests, settings, output_type, callback=callback_on_step_end,
                          vae_tiling=vae_tiling)  # fmt: skip
        return self._in_turns(work, Call(cancel, progress))

    def _work(
        self,
        requests: Sequence[Request],
        settings: dict[str, Any],
        output_type: str,
        **more: Any,
    ) -> Work:
        check_output_type(output_type)
        filled = [request.filled(**settings) for request in check_requests(requests)]
        with torch.inference_mode():
            return work_each(self, filled, output_type, **more)

    def _at_once(self, work: Work, call: Call, *, fail_fast: bool) -> list[ImageResult]:
        """All images in one turn. fail_fast: raise the first error of an image."""
        results: list[ImageResult] = []
        with self._turns.take(call), torch.inference_mode():
            for batch in make(self, work, call):
                results += batch
                for error in (result.error for result in batch if fail_fast):
                    if error is not None:
                        raise error
            call.check("before it returned")
        return results

    def _in_turns(self, work: Work, call: Call) -> Iterator[ImageResult]:
        """All images, a turn for each batch."""
        batches = make(self, work, call)
        while True:
            with self._turns.take(call), torch.inference_mode():
                batch = next(batches, None)
            if batch is None:
                return
            yield from batch

    @torch.inference_mode()
    def warmup(
        self,
        buckets: Sequence[Bucket | str] | None = None,
        *,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: str | Scheduler | None = None,
        force_scheduler: bool = False,
        prompts: Sequence[str] = WARMUP_PROMPTS,
        approximate: StepCache | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Do now what the first request of each shape would wait for; returns the graphs kept.

        buckets: those of the bundle's resolution, or aspect ratios "W:H"; by default all 40, which
            have far fewer token counts, and the graphs are by token count.
        prompts: one of each length that will be asked: cross-attention has another form for up to
            16, 32 and 64 tokens and above.
        approximate: that of the requests to come; their graphs hold the steps that are not skipped.
        progress: called with a name, shapes done and shapes in all; by default a bar on stderr.
        On a GPU the PyTorch and AOTInductor backends capture their loop as a CUDA graph; and the
        text encoder at each of its lengths, for one prompt and for `batch_size`, unless it is
        offloaded or on the CPU. Elsewhere a step runs once for each shape, which compiles. The VAE
        decodes one batch of each shape. Graphs that did not fit are warned of (see
        `denoiser.graphs.max_bytes`).
        """
        requests = [
            Request(
                prompt=prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                scheduler=scheduler,
                force_scheduler=force_scheduler,
                approximate=approximate,
            )
            for prompt in prompts
        ]
        shapes = one_of_each_token_count(self.resolution, buckets)
        with self._turns.take(Call()):
            return warm_up(self, requests, shapes, batch_size, progress)
