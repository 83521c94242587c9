"""What a CUDA graph holds neither asks the device for a value nor copies from the host.

The loop and the text encoder run on the meta device, which has shapes and no values, through the
very functions that a capture runs. The operators of kernels/ are one node each here; a kernel's
launch is tested with the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixart_rt.backends.engine_files import Chain, FunctionPart, forms_of, part_inputs
from pixart_rt.checkpoints.bundle_module import DenoiserModule, TextEncoderModule
from pixart_rt.config import Kernels, ModelConfig, Quality
from pixart_rt.inference.prompts import PromptEncoder, TextTokens
from pixart_rt.inference.step_cache import Skipping
from pixart_rt.inference.token_loop import LoopInputs, TextInputs, run_loop
from pixart_rt.model.text_encoder import T5Config, T5Encoder
from pixart_rt.model.transformer import PixArtTransformer

META = torch.device("meta")
CONFIG = ModelConfig(num_layers=2, num_heads=2, caption_channels=32, micro_conditioning=False)
T5 = T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=2)
B, N, T, STEPS = 2, 64, 120, 20
D, H, K = CONFIG.hidden_size, CONFIG.num_heads, CONFIG.head_dim


class OnDeviceOnly(TorchDispatchMode):
    """Refuses an operator that reads or makes a tensor of the host, or waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if "_local_scalar_dense" in name or "nonzero" in name:
            raise AssertionError(f"{name} waits for the device")
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type != "meta":
                raise AssertionError(f"{name} has a tensor on {value.device}")
        self.operators += 1
        return result


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def text(rows: int, constant: int, length: int | None) -> TextInputs:
    """The unconditional half as `constant` rows, the others absorbed at `length` or not."""
    usual: dict[str, Any] = {
        "null_rows": empty(constant, dtype=torch.int64),
        "text_rows": empty(rows, dtype=torch.int64),
        "constant": empty(2, constant, 1, D),
        "prompt_mask": empty(rows, T, dtype=torch.bool),
    }
    if length is None:
        return TextInputs(**usual, text_kv=empty(2, rows, T, 2, H, K))
    return TextInputs(
        **usual,
        absorbed_keys=empty(2, rows, H * length, D),
        absorbed_bias=empty(2, rows, H, length),
        absorbed_values=empty(2, rows, H * length, D),
    )


def inputs(guided: TextInputs, plain: TextInputs) -> LoopInputs:
    """20 steps of which the last two are not guided."""
    return LoopInputs(
        x=empty(B, N, CONFIG.token_channels),
        pos_embed=empty(B, N, D),
        modulation=empty(STEPS, B, 7, D),
        coefficients=empty(STEPS, B, 8),
        outputs=empty(16, dtype=torch.int64),
        plain=plain,
        guided=guided,
        guides=(True,) * (STEPS - 2) + (False,) * 2,
    )


def transformer(kernels: Kernels, quality: Quality, dtype: torch.dtype) -> Chain:
    with META:
        module = DenoiserModule(PixArtTransformer(CONFIG)).eval().requires_grad_(False).to(dtype)
    module.core.use(kernels, quality)
    parts = [FunctionPart(module, part_inputs("transformer", 0))]
    return Chain("transformer", parts, forms_of("transformer"), module, True)


@pytest.mark.parametrize(
    ("kernels", "quality", "dtype"),
    [
        (Kernels.REFERENCE, Quality.HIGH, torch.float32),
        (Kernels.FUSED, Quality.HIGH, torch.bfloat16),
        (Kernels.FUSED, Quality.LOSSLESS, torch.bfloat16),
        (Kernels.FUSED, Quality.FAST, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("length", [16, 64, None])
@pytest.mark.parametrize("constant", [B, 0])
def test_the_whole_loop_stays_on_the_device(
    kernels: Kernels, quality: Quality, dtype: torch.dtype, length: int | None, constant: int
) -> None:
    component = transformer(kernels, quality, dtype)
    values = inputs(text(2 * B - constant, constant, length), text(B, 0, length))
    with torch.inference_mode(), OnDeviceOnly() as mode:
        x = run_loop(Skipping(component, (5,)), values, CONFIG.in_channels)
    assert x.shape == values.x.shape and x.device == META
    assert mode.operators > 10 * STEPS


@pytest.mark.parametrize("length", [16, T])
def test_the_text_encoder_stays_on_the_device(length: int) -> None:
    with META:
        module = TextEncoderModule(T5Encoder(T5)).eval().requires_grad_(False)
    part = FunctionPart(module, part_inputs("text_encoder", 0))
    component = Chain("text_encoder", [part], module=module, capturable=True)
    encoder = PromptEncoder(None, component, META, 2)  # type: ignore[arg-type]
    tokens = TextTokens(*(empty(2, length, dtype=torch.int64) for _ in range(2)))
    with torch.inference_mode(), OnDeviceOnly() as mode:
        embeds = encoder._run(tokens)
    assert embeds.shape == (2, length, T5.d_model) and mode.operators > 20


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: bool((x > 0).all()),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor(1.0),  # a scalar on the host is copied at every call
        lambda x: x[x > 0],
    ],
    ids=["bool", "item", "cpu", "host tensor", "mask"],
)
def test_the_test_finds_each_fault(fault: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnDeviceOnly():
        fault(empty(3))
