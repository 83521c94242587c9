"""Floors from given rates, and rates that are a machine's."""

from __future__ import annotations

import pytest
import torch

from pixart_rt.bench.counts import Product
from pixart_rt.bench.roofline import Rates, better, floor, measure_rates

RATES = Rates(copy_tb_per_s=2.0, matmul_tflop_per_s=100.0, dtype="bfloat16")


def test_a_product_takes_the_longer_of_its_two_times() -> None:
    compute = Product("a", flops=int(100e12), elements=1)  # a second of arithmetic
    memory = Product("b", flops=1, elements=int(3e12), times=2)  # 6 TB each: twice three seconds
    assert RATES.seconds([compute]) == pytest.approx(1.0)
    assert RATES.seconds([memory]) == pytest.approx(6.0)
    assert RATES.seconds([compute, memory]) == pytest.approx(7.0)


def test_a_floor_by_stage() -> None:
    found = floor({"x": [Product("a", int(50e12), int(1e9), 2)], "y": None}, RATES)
    assert found["y"] is None
    assert found["x"] == {"tflop": 100.0, "gb": 4.0, "seconds": pytest.approx(1.0)}


def test_the_higher_of_each_rate_is_kept() -> None:
    other = Rates(copy_tb_per_s=1.0, matmul_tflop_per_s=120.0, dtype="bfloat16")
    assert better(RATES, other) == Rates(2.0, 120.0, "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_possible(dtype: torch.dtype) -> None:
    """Between a thousandth of a core's and a rack's: catches a wrong power of ten."""
    rates = measure_rates(torch.device("cpu"), dtype)
    assert 1e-4 < rates.copy_tb_per_s < 10
    assert 1e-4 < rates.matmul_tflop_per_s < 1e3
    assert rates.dtype == str(dtype).removeprefix("torch.")
