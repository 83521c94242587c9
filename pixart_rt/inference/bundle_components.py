"""A bundle's components, loaded, and what the pipeline makes of them: prompt encoder, denoiser."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from pixart_rt.backends.component import Component
from pixart_rt.backends.loading import Loader
from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.config import Precision, Quality, Saving
from pixart_rt.errors import BundleError
from pixart_rt.inference.denoiser import Denoiser
from pixart_rt.inference.prompts import NULL_PROMPT, PromptEncoder, TextCache
from pixart_rt.inference.request_plan import Planner, load_modulator
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_kv import TEXT_SIDE, TextSide
from pixart_rt.model.tokenizer import PromptTokenizer


class PlacedComponent:
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


def read_manifest(path: Path, *, check: bool) -> Manifest:
    """The manifest of a bundle that can make images; with `check`, of one that is not damaged."""
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
    return manifest


def load_components(
    path: Path, manifest: Manifest, device: str | torch.device | None, loader: Loader
) -> tuple[dict[str, Component], torch.device]:
    """Every component of the bundle, and the device of its transformer."""
    components: dict[str, Component] = {}
    places: dict[str, torch.device] = {}
    for name in manifest.components:
        loaded, places[name] = loader.load(path, manifest, name, device)
        components[name] = PlacedComponent(loaded, places[name])
    return components, places["transformer"]


def make_prompt_encoder(
    manifest: Manifest,
    folder: Path,
    text_encoder: Component | None,
    device: torch.device,
    prompt_cache: Path | None,
) -> PromptEncoder | None:
    """The prompt encoder of a bundle, None for one without text encoder."""
    if text_encoder is None:
        return None
    return PromptEncoder(
        PromptTokenizer(folder / "tokenizer", manifest.config.max_text_tokens),
        text_encoder,
        device,
        2 * int(manifest.engine_config["max_batch"]),
        null_prompt=folder / NULL_PROMPT,
        disk=prompt_cache,
        disk_key=_text_key(manifest),
    )


def _text_key(manifest: Manifest) -> str:
    """All that embeddings depend on but their text: the encoder's files, how its weights are kept
    when they are loaded, and where a prompt is cut.
    """
    files = sorted(manifest.components["text_encoder"].files.values())
    weights, longest = manifest.weights_of("text_encoder"), manifest.config.max_text_tokens
    return " ".join([*files, weights, str(longest)])


def make_denoiser(
    manifest: Manifest, folder: Path, transformer: Component, device: torch.device
) -> Denoiser:
    """The denoiser of a bundle around its transformer."""
    config = manifest.config
    precision = DTYPES[Precision(manifest.engine_config["precision"])]
    savings = frozenset(Saving)
    lossless = None
    if manifest.quality is Quality.LOSSLESS:  # absorbed text rounds elsewhere
        lossless, savings = precision, savings - {Saving.ABSORBED_TEXT}
    modulator = load_modulator(folder / "modulator.safetensors", config)
    planner = Planner(modulator, config, folder / "scheduler", device, lossless)
    # An engine in half precision may run on a CPU, where PyTorch is slow in float16.
    wide = device.type == "cpu" and precision is torch.float16
    copies = 0 if manifest.control is None else manifest.control.num_copies
    side = TextSide.load(folder / TEXT_SIDE, config, copies)
    texts = TextCache(side.to(device, torch.float32 if wide else precision))
    return Denoiser(transformer, config, planner, texts, device, savings)
