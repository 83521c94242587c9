"""Marks around calls: what is inside a stage, and that nothing of the original is hidden."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pixart_rt.bench.stages import STAGES, Stages, split


class Part:
    """A component with a method and an attribute of its own."""

    dtype = torch.float32

    def __call__(self, value: int, *, seconds: float) -> int:
        time.sleep(seconds)
        return value + 1


class Owner:
    def __init__(self) -> None:
        self.text_encoder, self.transformer, self.vae_decoder = Part(), Part(), Part()


def test_a_request_is_split_where_its_parts_begin() -> None:
    calls = [
        ("text_encoder", 1.0, 2.0),
        ("text_encoder", 2.5, 3.0),
        ("transformer", 4.0, 5.0),
        ("transformer", 5.5, 6.5),
        ("vae_decoder", 7.0, 9.0),
    ]
    found = split(calls, 10.0)
    assert found == {
        "text_encoder": 1.5, "denoising": 3.0, "vae_decoder": 2.0, "rest": 3.5, "steps": [1.0, 1.0]
    }  # fmt: skip


def test_a_loop_that_calls_no_transformer_begins_after_the_text() -> None:
    found = split([("text_encoder", 1.0, 2.0), ("vae_decoder", 7.0, 9.0)], 10.0)
    assert (found["denoising"], found["rest"], found["steps"]) == (5.0, 2.0, [])


def test_a_request_without_a_decoder_cannot_be_split() -> None:
    with pytest.raises(RuntimeError, match="VAE"):
        split([("transformer", 0.0, 1.0)], 2.0)


def test_watched_parts_keep_their_results_and_attributes() -> None:
    owner, stages = Owner(), Stages(torch.device("cpu"))
    for part in ("text_encoder", "transformer", "vae_decoder"):
        stages.watch(owner, part, part)
    assert owner.transformer.dtype is torch.float32

    def request() -> int:
        value = owner.text_encoder(1, seconds=0.01)
        for _ in range(3):
            value = owner.transformer(value, seconds=0.02)
        return owner.vae_decoder(value, seconds=0.03)

    for _ in range(2):  # the second request does not see the first one's marks
        result, seconds = stages.measure(request)
        assert result == 6
        assert len(seconds["steps"]) == 3
        # A sleep lasts at least as long as asked; how much longer is the machine's affair.
        assert seconds["text_encoder"] >= 0.01 and seconds["denoising"] >= 0.06
        assert seconds["vae_decoder"] >= 0.03 and seconds["rest"] >= 0
        assert sum(seconds[name] for name in STAGES) == pytest.approx(seconds["total"])


@pytest.mark.gpu
def test_stages_on_a_gpu_count_device_time() -> None:
    device = torch.device("cuda")

    class Owner:
        def __init__(self) -> None:
            x = torch.randn(4096, 4096, device=device)
            work: Any = lambda: x @ x  # noqa: E731
            self.text_encoder = self.transformer = self.vae_decoder = work

    owner, stages = Owner(), Stages(device)
    for part in ("text_encoder", "transformer", "vae_decoder"):
        stages.watch(owner, part, part)
    _, seconds = stages.measure(
        lambda: (owner.text_encoder(), owner.transformer(), owner.vae_decoder())
    )
    assert seconds["steps"][0] > 1e-5, "137 GFLOP cannot end when they are launched"
    assert sum(seconds[name] for name in STAGES) == pytest.approx(seconds["total"])
