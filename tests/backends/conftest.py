"""Small real components, their engines and bundles around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pixart_rt.bundle import ComponentEntry, Manifest, hash_files
from pixart_rt.checkpoints.bundle_module import DenoiserModule, HiddenModule, TextEncoderModule
from pixart_rt.config import ModelConfig
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, vae_from_config

TEXT_TOKENS = 20
CONFIG = ModelConfig(
    num_layers=1,
    num_heads=1,
    caption_channels=32,
    max_text_tokens=TEXT_TOKENS,
    sample_size=32,
    micro_conditioning=False,
)
T5 = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2)
VAE = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="session")
def transformer() -> DenoiserModule:
    torch.manual_seed(0)
    return DenoiserModule(PixArtTransformer(CONFIG)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vae_decoder() -> VaeDecoder:
    torch.manual_seed(0)
    return VaeDecoder(vae_from_config(VAE)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def text_encoders() -> tuple[nn.Module, nn.Module, nn.Module]:
    """An encoder of two layers, and the same as two parts of one layer each."""
    torch.manual_seed(0)
    whole, first, second = (T5Encoder(T5, *cut) for cut in ((0, 2), (0, 1), (1, 2)))
    state = whole.state_dict()
    first.load_state_dict({name: state[name] for name in first.state_dict()})
    renamed = {name: name.replace("layers.0", "layers.1") for name in second.state_dict()}
    second.load_state_dict({name: state[source] for name, source in renamed.items()})
    modules = TextEncoderModule(whole), TextEncoderModule(first), HiddenModule(second)
    return tuple(module.eval().requires_grad_(False) for module in modules)  # type: ignore


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """A bundle of one component whose files have been written into its folder."""

    def make(name: str, parts: tuple[str, ...], **entry: object) -> tuple[Path, Manifest]:
        folder = tmp_path / name
        files = hash_files(tmp_path, [path for path in folder.iterdir() if path.is_file()])
        values = {"backend": "any", "precision": "fp32", **entry}
        component = ComponentEntry(parts=parts, files=files, **values)  # type: ignore[arg-type]
        manifest = Manifest(
            pixart_rt_version="0",
            key="0",
            created="2000-01-01T00:00:00Z",
            model={},
            model_config=CONFIG.to_dict(),
            engine_config={},
            components={name: component},
            files={},
            vae={},
            scheduler="dpm-solver++",
            buckets=[],
            versions={},
            build={},
        )
        return tmp_path, manifest

    return make
