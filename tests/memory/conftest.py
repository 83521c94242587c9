"""Modules of any shape, and their inputs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart_rt.checkpoints.bundle_module import DenoiserModule, TextEncoderModule
from pixart_rt.config import Kernels, ModelConfig, Precision
from pixart_rt.export.onnx_export import transformer_inputs
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_encoder import T5Config, T5Encoder, keep_dtype
from pixart_rt.model.transformer import PixArtTransformer
from pixart_rt.model.vae import VaeDecoder, vae_from_config


class Make:
    """Components in eval mode, on the CPU or whatever device context is present."""

    def transformer(self, config: ModelConfig, precision: Precision) -> DenoiserModule:
        module = DenoiserModule(PixArtTransformer(config)).eval().requires_grad_(False)
        return module.to(DTYPES[precision])

    def transformer_inputs(
        self,
        config: ModelConfig,
        rows: int,
        num_tokens: int,
        *,
        precision: Precision,
        constant: int = 0,
        length: int = 0,
    ) -> dict[str, Tensor]:
        """For `rows` rows of which the first `constant` have a vector, two rows an image if any
        do. The text has the core's dtype, as a pipeline's text side gives it.
        """
        inputs = transformer_inputs(config, batch=rows - constant, num_tokens=num_tokens,
                                    guided=constant)  # fmt: skip
        dtype = DTYPES[precision]
        outputs = range(config.patch_size**2 * config.out_channels)
        noise = [index for index in outputs if index % config.out_channels < config.in_channels]
        inputs["outputs"] = torch.tensor(noise)
        inputs["constant"] = inputs["constant"].to(dtype)
        inputs["text_kv"] = inputs["text_kv"].to(dtype)
        if length:
            del inputs["text_kv"]
            slots = (config.num_layers, rows - constant, config.num_heads * length)
            inputs["absorbed_keys"] = torch.randn(*slots, config.hidden_size, dtype=dtype)
            inputs["absorbed_values"] = torch.randn(*slots, config.hidden_size, dtype=dtype)
            inputs["absorbed_bias"] = torch.randn(*slots).unflatten(2, (config.num_heads, length))
        return inputs

    def text_encoder(self, t5: T5Config, precision: Precision) -> nn.Module:
        module = TextEncoderModule(T5Encoder(t5)).eval().requires_grad_(False)
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(keep_dtype(name, DTYPES[precision]))
        return module

    def text_inputs(self, t5: T5Config, rows: int, num_tokens: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(0, t5.vocab_size, (rows, num_tokens)),
            "attention_mask": torch.ones(rows, num_tokens, dtype=torch.long),
        }

    def vae(self, channels: list[int]) -> tuple[VaeDecoder, dict[str, Any]]:
        """In float32, as a pipeline runs it, with its diffusers configuration."""
        config = {
            "block_out_channels": channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
        }
        module = VaeDecoder(vae_from_config(config))
        module.use(Kernels.REFERENCE)
        return module, config


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU operators are their references, as for a user: tests/conftest.py has Triton's
    interpreter run kernels, whose memory is another's.
    """
    for name in ("cross_attention", "solver"):
        module = importlib.import_module(f"pixart_rt.kernels.{name}")
        real = module.runs_triton

        def runs(op: str, x: Tensor, least: tuple[int, int], real: Any = real) -> bool:
            return x.is_cuda and bool(real(op, x, least))

        monkeypatch.setattr(module, "runs_triton", runs)


@pytest.fixture
def make() -> Make:
    torch.manual_seed(0)
    return Make()
