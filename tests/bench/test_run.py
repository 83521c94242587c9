"""One document: its keys and counts, times that add up, images that agree. No speed is asserted."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_rt.bench import run as run_module
from pixart_rt.bench.measure import Series
from pixart_rt.bench.request import BenchRequest
from pixart_rt.bench.run import _work, run, speedup
from pixart_rt.bench.stages import STAGES
from pixart_rt.bundle import Manifest
from pixart_rt.errors import ConfigError


def all_series(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for system in measured["systems"].values() for each in system["series"]]


def test_the_document_is_json_with_its_origin(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["command"] == "the command"
    assert measured["versions"]["torch"] == version("torch")
    assert measured["hardware"]["cores"] >= 1
    asked = measured["request"]
    assert (asked["height"], asked["width"], asked["num_tokens"]) == (176, 352, 11 * 22)
    assert asked["threads"] == torch.get_num_threads()


def test_every_series_is_there_once(measured: dict[str, Any]) -> None:
    names = {
        name: [(each["batch"], each["prompts"]) for each in system["series"]]
        for name, system in measured["systems"].items()
    }
    assert names == {
        "pixart_rt": [(2, "new"), (2, "cached"), (1, "new")],
        "diffusers": [(2, "new"), (1, "new")],
    }
    for each in all_series(measured):
        assert len(each["latency_s"]) == 3, "the warm-up is not counted"
        assert all(len(each["stages_s"][name]) == 3 for name in STAGES)
        assert each["first_call_s"] > 0 and each["prepare_s"] >= 0
        assert each["transformer_calls"] == 2, "once a step, both halves of guidance together"


def test_the_stages_add_up_to_the_whole(measured: dict[str, Any]) -> None:
    for each in all_series(measured):
        for k, total in enumerate(each["latency_s"]):
            parts = [each["stages_s"][name][k] for name in STAGES]
            assert sum(parts) == pytest.approx(total, abs=1e-9)
            assert min(parts) >= 0
        assert sum(each["stages_mean_s"].values()) == pytest.approx(each["mean_s"], abs=1e-9)
        assert each["stages_mean_s"]["denoising"] > each["transformer_call_s"]["p50_s"]


def test_only_a_cached_prompt_needs_no_text_encoder(measured: dict[str, Any]) -> None:
    for each in all_series(measured):
        spent = each["stages_s"]["text_encoder"]
        assert all(seconds == 0 for seconds in spent) is (each["prompts"] == "cached")


def test_percentiles_are_ordered(measured: dict[str, Any]) -> None:
    for each in all_series(measured):
        low, high = min(each["latency_s"]), max(each["latency_s"])
        ordered = [low, each["p50_s"], each["p90_s"], each["p99_s"], high]
        assert all(a <= b for a, b in pairwise(ordered))
        assert each["images_per_s"] == pytest.approx(each["batch"] / each["p50_s"])


def test_the_peers_images_are_ours(measured: dict[str, Any]) -> None:
    (agreement,) = measured["agreement"].values()
    assert agreement["agrees"] is True
    assert agreement["images"] == 2 * (3 + 1), "every repetition of both batch sizes, warm-up too"
    assert agreement["psnr_db"] is None or agreement["psnr_db"] > 50  # float32 on both sides
    assert agreement["mean_abs"] < 0.5
    assert agreement["unrelated_psnr_db"] < 50, "images of other prompts and seeds are others"


def test_floors_are_below_each_other_and_positive(measured: dict[str, Any]) -> None:
    limits = measured["roofline"]
    assert limits["batch"] == 2 and limits["matmul_dtype"] == "float32"
    plain, exact = limits["floors"]["plain"], limits["floors"]["exact"]
    for name in ("text_encoder", "denoising", "vae_decoder"):
        assert 0 < exact[name]["tflop"] <= plain[name]["tflop"]
        compute = exact[name]["tflop"] / limits["matmul_tflop_per_s"]
        assert exact[name]["seconds"] >= compute * (1 - 1e-9)


def test_progress_counts_all_that_is_done(measured: dict[str, Any]) -> None:
    asked = measured["request"]
    request = BenchRequest(bundle=Path(asked["bundle"]), batches=(2, 1), repeats=3, warmup=1,
                           peers=("diffusers",), cold=False)  # fmt: skip
    images = (2 * 2 + 1) * (3 + 1)  # both systems at both sizes, the cached series at one
    said: list[tuple[int, int]] = []
    assert _work(request, ("pixart_rt", "diffusers")) == 2 + 2 + 2 * 2 + images
    run(replace(request, steps=2, repeats=1), "", lambda _, done, total: said.append((done, total)))
    assert said == [(done, len(said)) for done in range(len(said))]


def test_other_weights_are_noticed(bundle_256: Path, pipeline_folder: Any, tmp_path: Path) -> None:
    """The bound must be able to fail: a peer of other random weights draws another image."""
    other = Path(shutil.copytree(pipeline_folder(32), tmp_path / "other"))
    model = PixArtTransformer2DModel.from_pretrained(other / "transformer")
    model.proj_out.weight.data.mul_(-1)
    model.save_pretrained(other / "transformer")
    request = BenchRequest(bundle=bundle_256, steps=2, repeats=1, warmup=1, peers=("diffusers",),
                           peer_model=other, cold=False, min_psnr=30.0)  # fmt: skip
    agreement = run(request, "")["agreement"]["diffusers"]
    assert agreement["agrees"] is False
    assert agreement["bound_psnr_db"] == 30.0 and agreement["psnr_db"] < 30


def test_the_compiler_cache_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    name = run_module.COMPILE_CACHE
    for before in ("somewhere", None):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        with run_module._empty_compile_cache():
            folder = Path(os.environ[name])
            assert folder.is_dir() and folder != Path("somewhere")
        assert os.environ.get(name) == before
        assert not folder.exists()


def test_speedup_is_paired_by_repetition() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    def series(name: str, prompts: str, totals: list[float]) -> Series:
        samples = [{"total": each} for each in totals]
        return Series(Named(name), prompts, 1, samples=samples)  # type: ignore[arg-type]

    drifting = [
        series("pixart_rt", "new", [1.0, 2.0, 10.0]),
        series("pixart_rt", "cached", [1.0, 1.0, 1.0]),
        series("diffusers", "new", [3.0, 4.0, 20.0]),
    ]
    assert speedup(drifting, "diffusers") == {"paired": 2.0, "p50": 2.0, "cached": 4.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repeats": 0}, "repeats"),
        ({"warmup": 0}, "warmup"),
        ({"threads": 0}, "threads"),
        ({"batches": ()}, "batches"),
        ({"batches": (1, 0)}, "batches"),
        ({"batches": (2, 2)}, "twice"),
        ({"peers": ("onediff",)}, "diffusers-compile"),
        ({"peers": ("diffusers", "diffusers")}, "twice"),
        ({"steps": 0}, "between 1 and"),
        ({"steps": 1, "peers": ("diffusers",)}, "cannot run 1 step"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
def test_impossible_requests(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchRequest(bundle=Path("b"), **values)


def test_what_a_bundle_cannot_serve(bundle_256: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(bundle_256)
    request = BenchRequest(bundle=bundle_256)
    with pytest.raises(ConfigError, match="--max-batch 3"):
        replace(request, batches=(1, 3)).checked(manifest)
    with pytest.raises(ConfigError, match="width:height"):
        replace(request, aspect_ratio="wide").checked(manifest)
    silent = {name: manifest.components[name] for name in ("transformer", "vae_decoder")}
    with pytest.raises(ConfigError, match="no text encoder"):
        request.checked(replace(manifest, components=silent))
    beside = replace(request, peers=("diffusers",))
    with pytest.raises(ConfigError, match="leave --peer out"):
        beside.checked(replace(manifest, scheduler="lcm"))
    config = {**manifest.model_config, "cfg_null": "y-embedding"}
    with pytest.raises(ConfigError, match="leave --peer out"):
        beside.checked(replace(manifest, model_config=config))
    with pytest.raises(ConfigError, match="--peer-model DIR"):
        replace(beside, peer_model=tmp_path).checked(manifest)
    gone = {**manifest.model, "source": str(tmp_path / "gone")}
    with pytest.raises(ConfigError, match="--peer-model DIR"):
        beside.checked(replace(manifest, model=gone))
    found = beside.checked(manifest).peer_model
    assert found is not None and (found / "model_index.json").is_file()
