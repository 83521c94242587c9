"""Choosing what fits: the order of tiers, the limits, and the words where nothing does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pixart_rt.bundle import ComponentEntry, Manifest
from pixart_rt.config import EngineConfig, Precision, Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.inference.vae_tiling import Tiling
from pixart_rt.memory.fit import fit_engine
from pixart_rt.memory.forecast import Setting, forecast
from pixart_rt.memory.shapes import bundle_shape, find_shape
from pixart_rt.memory.tiers import GIB, RESERVE, choices, choose, parse_bytes, tiers

XL = find_shape("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)


def chosen(limit: int, setting: Setting | None = None) -> str:
    return choose(choices(XL, 1024, setting or Setting(), limit), limit).tier.name


def test_less_memory_never_chooses_a_better_tier() -> None:
    order = [tier.name for tier in tiers(Setting(), True)]
    picks = [order.index(chosen(tenths * GIB // 10)) for tenths in range(34, 160)]
    assert picks == sorted(picks, reverse=True)
    assert {order[pick] for pick in picks} == {
        "full", "text-offload", "text-int8", "text-int8-offload", "text-cpu", "text-cpu-tiled",
        "int8-text-cpu-tiled",
    }  # fmt: skip


def test_a_tier_fits_down_to_its_peak_and_the_reserve() -> None:
    full = forecast(XL, 1024, Setting()).peak + RESERVE
    assert chosen(full) == "full"
    assert chosen(full - 1) != "full"


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_tier_takes_less_than_all_better_ones(batch: int) -> None:
    found = choices(XL, 1024, Setting(batch=batch))
    peaks = [each.forecast.peak for each in found]
    assert found[0].tier.name == "full"
    assert peaks == sorted(set(peaks), reverse=True)
    assert all(each.fits is None for each in found)
    every = tiers(Setting(batch=batch), True)
    left_out = [tier for tier in every if tier not in [each.tier for each in found]]
    assert left_out, "some save nothing"
    for tier in left_out:
        peak = forecast(XL, 1024, tier.setting).peak
        better = every[: every.index(tier)]
        assert any(each.forecast.peak <= peak for each in found if each.tier in better)


def test_tiles_come_before_coarser_weights_and_after_what_changes_no_image() -> None:
    order = [tier.name for tier in tiers(Setting(), True)]
    assert order[:4] == ["full", "text-offload", "tiled", "text-offload-tiled"]
    assert order.index("text-offload-tiled") < order.index("text-int8")
    assert order.index("text-cpu-tiled") < order.index("int8-text-cpu")
    assert [tier.name for tier in tiers(Setting(), False)] == [
        "full", "tiled", "int8", "int8-tiled"
    ]  # fmt: skip
    already = tiers(Setting(tiling=Tiling()), True)
    assert all(tier.setting.tiling is not None for tier in already)
    assert not any("tiled" in tier.name for tier in already)


def test_many_images_at_once_are_decoded_in_tiles_before_anything_is_rounded() -> None:
    """Eight images: the VAE takes 12 GiB, the text encoder's weights 9."""
    assert chosen(14 * GIB, Setting(batch=8)) == "text-offload-tiled"
    decode = [forecast(XL, 1024, Setting(batch=batch, tiling=Tiling())).parts["vae_decoder"]
              for batch in (1, 8)]  # fmt: skip
    assert decode[0] == decode[1], "one tile at a time"
    whole = forecast(XL, 512, Setting(batch=4)).parts["vae_decoder"].activations
    tiles = forecast(XL, 512, Setting(batch=4, tiling=Tiling())).parts["vae_decoder"].activations
    assert tiles == whole / 4, "where a tile covers the image, still one image at a time"


def test_nothing_fits_names_the_smallest_and_what_would() -> None:
    with pytest.raises(CapacityError, match="the smallest is int8-text-cpu-tiled with") as caught:
        chosen(2 * GIB)
    asked = str(caught.value).partition("give --vram ")[2].partition(",")[0]
    assert chosen(parse_bytes(asked)) == "int8-text-cpu-tiled"


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
    wide = replace(config, max_batch=8)
    fitted, choice = fit_engine(XL.name, wide, 14 * GIB, on_gpu=True)
    assert choice.tier.name == "text-offload-tiled"
    assert fitted == replace(
        wide, vae_tiling=True, text_place=TextPlace.OFFLOAD, text_encoder_backend="torch"
    )
    again, _ = fit_engine(XL.name, fitted, 14 * GIB, on_gpu=True)
    assert again.vae_tiling
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
