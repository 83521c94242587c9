"""Choosing what fits: the order of tiers, the limits, and the words where nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pixart_rt.bundle import ComponentEntry, Manifest
from pixart_rt.config import EngineConfig, Precision, Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.memory.fit import fit_engine
from pixart_rt.memory.forecast import Setting, forecast
from pixart_rt.memory.shapes import bundle_shape, find_shape
from pixart_rt.memory.tiers import GIB, RESERVE, choices, choose, parse_bytes, tiers

XL = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)


def chosen(limit: int, setting: Setting | None = None) -> str:
    return choose(choices(XL, 1024, setting or Setting(), limit), limit).tier.name


def test_less_memory_never_chooses_a_better_tier() -> None:
    order = [tier.name for tier in tiers(Setting(), True)]
    picks = [order.index(chosen(tenths * GIB // 10)) for tenths in range(44, 160)]
    assert picks == sorted(picks, reverse=True)
    assert {order[pick] for pick in picks} >= {"full", "text-offload", "text-int8-offload",
                                               "text-cpu", "int8-text-cpu"}  # fmt: skip


def test_a_tier_fits_down_to_its_peak_and_the_reserve() -> None:
    full = forecast(XL, 1024, Setting()).peak + RESERVE
    assert chosen(full) == "full"
    assert chosen(full - 1) != "full"


def test_every_tier_but_the_full_one_takes_less_than_it() -> None:
    found = choices(XL, 1024, Setting())
    assert all(each.forecast.peak < found[0].forecast.peak for each in found[1:])
    assert len({each.forecast.peak for each in found}) == len(found)
    assert all(each.fits is None for each in found)


def test_nothing_fits_names_the_smallest_and_what_would() -> None:
    with pytest.raises(CapacityError, match="the smallest is int8-text-cpu") as caught:
        chosen(2 * GIB)
    asked = str(caught.value).partition("give --vram ")[2].partition(",")[0]
    assert chosen(parse_bytes(asked)) == "int8-text-cpu"


def test_only_quality_high_has_quantized_transformers() -> None:
    for quality in Quality:
        found = tiers(Setting(quality=quality), True)
        quantized = any(tier.setting.weights is not Weights.FULL for tier in found)
        assert quantized == (quality is Quality.HIGH)


def test_stages_hold_what_their_place_says() -> None:
    """Offloading moves exactly the weights from all stages into the first; the CPU removes them."""
    resident, offload, host = (forecast(XL, 1024, Setting(text_place=place)) for place in TextPlace)
    weights = resident.parts["text_encoder"].weights
    assert weights == offload.parts["text_encoder"].brought
    assert resident.stages["encode"] == offload.stages["encode"]
    for stage in ("denoise", "decode"):
        assert resident.stages[stage] - offload.stages[stage] == weights
        assert host.stages[stage] == offload.stages[stage]
    assert host.stages["encode"] < offload.stages["encode"] - weights + 1


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 << 30), ("7.5GiB", 15 << 29), ("512 m", 512 << 20), ("100", 100)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "8X", "-8G", "0", "nan", "infG", "8 8G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 8G"):
        parse_bytes(text)


def test_a_build_gets_the_tier_s_settings() -> None:
    config = EngineConfig(
        backend="torch-compile", precision=Precision.BF16, text_precision=Precision.BF16
    )
    fitted, choice = fit_engine(XL.name, config, 8 * GIB, on_gpu=True)
    assert choice.tier.name == "text-int8-offload"
    assert fitted == replace(
        config,
        text_weights=Weights.INT8,
        text_place=TextPlace.OFFLOAD,
        text_encoder_backend="torch",
    )
    with pytest.raises(ConfigError, match="tiers are for --backend torch"):
        fit_engine(XL.name, EngineConfig(backend="tensorrt-rtx"), 8 * GIB, on_gpu=True)


def test_a_bundle_of_engines_has_no_forecast(tmp_path: Path) -> None:
    entry = ComponentEntry(backend="tensorrt", precision="fp16", parts=("x",), files={})
    manifest = Manifest(
        pixart_rt_version="0", key="0", created="", model={}, model_config={},
        engine_config={}, components={"transformer": entry}, files={}, vae={},
        scheduler="dpm-solver++", buckets=[], versions={}, build={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="transformer in tensorrt"):
        bundle_shape(tmp_path, manifest)


@pytest.mark.parametrize(
    ("model", "resolution"), [("nobody/nothing", 1024), ("tiny", 512), (XL.name, 512)]
)
def test_unknown_models_and_other_resolutions_are_refused(model: str, resolution: int) -> None:
    with pytest.raises(ConfigError, match=r"--model nobody|--res 512"):
        find_shape(model, resolution)
