"""The denoising loop and the text encoder, at full size, hold nothing that a CUDA graph cannot.

On the meta device, which has shapes and no values: an operator that needs a value fails there of
itself, and what PyTorch would do with the host is caught by name (tests/capture_clean.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixart_rt.config import Quality
from pixart_rt.inference.token_loop import run_loop
from pixart_rt.kernels.solver import cfg_dpmpp_step
from pixart_rt.model.text_encoder import T5_XXL, T5Encoder, keep_dtype
from tests.capture_clean import CaptureClean, NotCapturable
from tests.xl_loop import STANDARD, denoiser, loop_inputs, xl

STEPS, BLOCKS = 20, 28
GUIDES = (True,) * 14 + (False,) * (STEPS - 14)  # guidance over a part of the steps


@pytest.mark.parametrize(("form", "blocks"), [(STANDARD, BLOCKS), (32, 4)])  # seconds a loop
@torch.no_grad()
def test_the_loop_is_capturable(form: int, blocks: int) -> None:
    model = denoiser(xl(1024, blocks), "meta", torch.bfloat16)
    config = model.core.config
    inputs = loop_inputs(config, 2, form, "meta", torch.bfloat16, GUIDES)
    with CaptureClean() as seen:
        x = run_loop(model, inputs, config.in_channels)
    assert x.shape == (2, 4096, 16)
    assert seen.count > STEPS * blocks * 8  # operators of a block


@torch.no_grad()
def test_the_loop_in_fp8_is_capturable() -> None:
    model = denoiser(xl(1024, 4), "meta", torch.bfloat16, Quality.FAST)
    inputs = loop_inputs(model.core.config, 2, STANDARD, "meta", torch.bfloat16, (True, False))
    with CaptureClean() as seen:
        run_loop(model, inputs, model.core.config.in_channels)
    assert seen.count > 2 * 4 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_text_encoder_is_capturable(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        encoder = T5Encoder(T5_XXL).eval()
        for name, parameter in encoder.named_parameters():
            parameter.data = parameter.data.to(keep_dtype(name, dtype))
        ids, mask = torch.zeros(2, 2, 120, dtype=torch.int64).unbind()
    with CaptureClean() as seen:
        embeds = encoder(ids, mask)
    assert embeds.shape == (2, 120, 4096)
    assert seen.count > 24 * 20


def reads_a_value(x: Tensor) -> object:
    return float(x.sum())


def branches(x: Tensor) -> object:
    return x if bool((x > 0).all()) else -x


def indexes_by_a_mask(x: Tensor) -> object:
    return x[x > 0]


def adds_a_number_of_the_host(x: Tensor) -> object:
    return x + torch.tensor(1.5)


def copies_from_the_host(x: Tensor) -> object:
    return x + torch.arange(16).to(x.device)


WRONG = (
    reads_a_value, branches, indexes_by_a_mask, adds_a_number_of_the_host, copies_from_the_host,
)  # fmt: skip


@pytest.mark.parametrize("step", WRONG, ids=lambda step: step.__name__)
@torch.no_grad()
def test_a_loop_that_is_not_capturable_is_found(step) -> None:
    """In the loop's own place for a step's work; what meta tensors refuse themselves is refused."""
    inputs = loop_inputs(xl(256, 1), 1, STANDARD, "meta", torch.bfloat16, (True, True))

    def transformer(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.empty(2, *tokens.shape[1:-1], 32, device="meta")

    def on_step(number: int, x: Tensor, x0: Tensor) -> Tensor:
        step(x)
        return x

    with CaptureClean(), pytest.raises((NotCapturable, RuntimeError, NotImplementedError)) as error:
        run_loop(transformer, inputs, 4, on_step)
    if not isinstance(error.value, NotCapturable):
        assert "meta" in str(error.value)


def test_the_solver_s_own_operator_is_seen() -> None:
    x = torch.empty(1, 4, 16, device="meta")
    with CaptureClean() as seen:
        cfg_dpmpp_step(torch.empty(2, 4, 32, device="meta"), x, x, torch.empty(8, device="meta"), 4)
    assert seen.count >= 1 + 2  # the tensors, and the operator
