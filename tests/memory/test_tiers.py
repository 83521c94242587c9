"""Choosing what fits: the order of tiers, the limits, and the words where nothing does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixart_rt.config import EngineConfig, Precision, Quality, TextPlace, Weights
from pixart_rt.errors import CapacityError, ConfigError
from pixart_rt.memory.forecast import forecast
from pixart_rt.memory.models import find_model
from pixart_rt.memory.tiers import (
    GIB,
    RESERVE,
    choose,
    fit_engine,
    parse_bytes,
    tiers,
    ways,
)

XL = find_model("PixArt-alpha/PixArt-XL-2-1024-MS", 1024)
HALF = EngineConfig(
    backend="torch", precision=Precision.BF16, text_precision=Precision.BF16
)  # fmt: skip
ONE = tiers(XL, HALF)


def chosen(limit: int) -> str:
    return choose(ONE, limit).name


def names(config: EngineConfig = HALF) -> list[str]:
    return [name for name, _, _ in ways(XL, config)]


def test_less_memory_never_chooses_a_better_tier() -> None:
    order = names()
    picks = [order.index(chosen(tenths * GIB // 10)) for tenths in range(34, 160)]
    assert picks == sorted(picks, reverse=True)
    assert {order[pick] for pick in picks} == {
        "full", "text-offload", "text-int8", "text-int8-offload", "text-cpu", "text-cpu-tiled",
        "int8-text-cpu-tiled",
    }  # fmt: skip


def test_a_tier_fits_down_to_its_peak_and_the_reserve() -> None:
    full = forecast(XL, HALF).peak + RESERVE
    assert chosen(full) == "full"
    assert chosen(full - 1) != "full"


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_tier_takes_less_than_all_better_ones(batch: int) -> None:
    config = replace(HALF, max_batch=batch)
    found, every = tiers(XL, config), ways(XL, config)
    peaks = {tier.name: tier.forecast.peak for tier in found}
    assert found[0].name == "full"
    assert list(peaks.values()) == sorted(set(peaks.values()), reverse=True)
    left_out = [way for way in every if way[0] not in peaks]
    assert left_out, "some save nothing"
    order = [name for name, _, _ in every]
    for name, _, changed in left_out:
        better = [peaks[each] for each in order[: order.index(name)] if each in peaks]
        assert min(better) <= forecast(XL, changed).peak


def test_tiles_come_before_coarser_weights_and_after_what_changes_no_image() -> None:
    order = names()
    assert order[:4] == ["full", "text-offload", "tiled", "text-offload-tiled"]
    assert order.index("text-offload-tiled") < order.index("text-int8")
    assert order.index("text-cpu-tiled") < order.index("int8-text-cpu")
    without = find_model("xl-random", 1024)
    assert [name for name, _, _ in ways(without, HALF)] == ["full", "tiled", "int8", "int8-tiled"]
    already = ways(XL, replace(HALF, vae_tiling=True))
    assert all(changed.vae_tiling for _, _, changed in already)
    assert not any("tiled" in name for name, _, _ in already)


def test_many_images_at_once_are_decoded_in_tiles_before_anything_is_rounded() -> None:
    """Eight images: the VAE takes 12 GiB, the text encoder's weights 9."""
    eight = replace(HALF, max_batch=8)
    assert choose(tiers(XL, eight), 14 * GIB).name == "text-offload-tiled"
    decode = [forecast(XL, replace(config, vae_tiling=True)).parts["vae_decoder"]
              for config in (HALF, eight)]  # fmt: skip
    assert decode[0] == decode[1], "one tile at a time"
    middle = find_model("PixArt-alpha/PixArt-XL-2-512x512", 512)
    four = replace(HALF, resolution=512, max_batch=4)
    whole, tiles = (
        forecast(middle, config).parts["vae_decoder"].activations
        for config in (four, replace(four, vae_tiling=True))
    )
    assert tiles == whole / 4, "where a tile covers the image, still one image at a time"


def test_nothing_fits_names_the_smallest_and_what_would() -> None:
    with pytest.raises(CapacityError, match="the smallest is int8-text-cpu-tiled with") as caught:
        chosen(2 * GIB)
    asked = str(caught.value).partition("give --vram ")[2].partition(",")[0]
    assert chosen(parse_bytes(asked)) == "int8-text-cpu-tiled"


def test_only_quality_high_has_quantized_transformers() -> None:
    for quality in Quality:
        found = ways(XL, replace(HALF, quality=quality))
        quantized = any(changed.weights is not Weights.FULL for _, _, changed in found)
        assert quantized == (quality is Quality.HIGH)


def test_stages_hold_what_their_place_says() -> None:
    """Offloading moves exactly the weights from all stages into the first; the CPU removes them."""
    resident, offload, host = (forecast(XL, replace(HALF, text_place=place)) for place in TextPlace)
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


@pytest.mark.parametrize("text", ["", "G", "8X", "-8G", "0", "nan", "infG", "8 8G", "1e9999999G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 8G"):
        parse_bytes(text)


def test_a_build_gets_the_tier_s_settings() -> None:
    config = EngineConfig(
        backend="torch-compile", precision=Precision.BF16, text_precision=Precision.BF16
    )
    tier = fit_engine(XL.name, config, 8 * GIB)
    assert tier.name == "text-int8-offload"
    assert tier.config == replace(
        config,
        text_weights=Weights.INT8,
        text_place=TextPlace.OFFLOAD,
        text_encoder_backend="torch",
    )
    wide = replace(config, max_batch=8)
    tier = fit_engine(XL.name, wide, 14 * GIB)
    assert tier.name == "text-offload-tiled"
    assert tier.config == replace(
        wide, vae_tiling=True, text_place=TextPlace.OFFLOAD, text_encoder_backend="torch"
    )
    assert fit_engine(XL.name, tier.config, 14 * GIB).config.vae_tiling
    with pytest.raises(ConfigError, match="tiers are for --backend torch"):
        fit_engine(XL.name, EngineConfig(backend="tensorrt-rtx"), 8 * GIB)


@pytest.mark.parametrize(
    ("model", "resolution"), [("nobody/nothing", 1024), ("tiny", 512), (XL.name, 512)]
)
def test_unknown_models_and_other_resolutions_are_refused(model: str, resolution: int) -> None:
    with pytest.raises(ConfigError, match=r"--model nobody|--res 512"):
        find_model(model, resolution)
