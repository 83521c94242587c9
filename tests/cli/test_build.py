"""`build`: options to an EngineConfig (the builder itself is replaced), refusals, a cache hit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pixart_rt.export.build as builder
from pixart_rt.bundle import Manifest
from pixart_rt.config import COMPONENTS, CfgNull, EngineConfig, Precision


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, hollow_bundle: Path) -> list[dict[str, Any]]:
    """The arguments of every requested build; none is made."""
    calls: list[dict[str, Any]] = []

    def fake(model: str, out: Path, config: EngineConfig, **options: Any) -> builder.BuildResult:
        calls.append({"model": model, "out": out, "config": config, **options})
        options["progress"]("transformer: export", 1, 3)
        return builder.BuildResult(out, False, Manifest.read(hollow_bundle), ["a note"])

    monkeypatch.setattr(builder, "build", fake)
    return calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--res", 300], "256, 512, 1024"),
        (["--backend", "cuda"], "tensorrt-rtx"),
        (["--components", "unet"], "transformer"),
        (["--components", ","], "transformer"),
        (["--text-encoder", "clip"], "neither engine nor torch"),
        (["--max-batch", 0], "max_batch"),
        (["--max-memory", 0], "give GiB above 0"),
        (["--controlnet", "hed", "--vram", "8G"], "whose memory is not predicted"),
        (["--target", "sm80", "--backend", "onnxruntime"], "--target sm80"),
        (["--plugins", "--backend", "onnxruntime"], "plugins were requested with backend"),
        (["--plugins", "--backend", "tensorrt-rtx", "--components", "vae"], "the transformer"),
        (["--model", "tiny", "--res", 1024, "--precision", "bf16", "--backend", "onnxruntime"],
         "bfloat16"),
    ],
)  # fmt: skip
def test_bad_use_is_refused_with_code_2(
    run: Callable[..., Any], tmp_path: Path, options: list[object], message: str
) -> None:
    outcome = run("build", "--out", tmp_path / "b", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.error
    assert not (tmp_path / "b").exists()


def test_a_place_that_cannot_be_is_refused_before_the_model_is_read(
    run: Callable[..., Any], asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Every web app has a manifest.json."""
    (tmp_path / "app" / "src").mkdir(parents=True)
    (tmp_path / "app" / "manifest.json").write_text('{"name": "My PWA"}')
    (tmp_path / "app" / "src" / "index.html").write_text("precious")
    (tmp_path / "file").write_text("mine")
    for out, says in (("app/src", "not a bundle"), ("file", "is a file"), ("/proc/b", "no new")):
        outcome = run("build", "--model", "./nowhere", "--out", tmp_path / out, "--force")
        assert outcome.code == 2 and says in outcome.error
    assert (tmp_path / "app" / "src" / "index.html").read_text() == "precious" and not asked


def test_an_unknown_model_is_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run("build", "--model", "./no/such/folder", "--out", tmp_path / "b")
    assert outcome.code == 1
    assert "--model tiny" in outcome.error


def test_no_network_names_the_model_that_needs_none(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args: object, **_options: object) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    outcome = run("build", "--res", 512, "--out", tmp_path / "b", "--backend", "torch")
    assert outcome.code == 1
    assert "PixArt-alpha/PixArt-XL-2-512x512" in outcome.error and "--model tiny" in outcome.error


def test_every_option_arrives(run: Callable[..., Any], asked: list[dict[str, Any]]) -> None:
    outcome = run(
        "build", "--model", "a/b.pth", "--res", 512, "--out", "o", "--backend", "tensorrt-rtx",
        "--target", "sm80,sm89", "--target", "sm80", "--precision", "bf16", "--text-precision",
        "fp32", "--components", "vae,t5", "--text-encoder", "torch", "--max-batch", 3,
        "--cfg-null", "y-embedding", "--heads", 4, "--sample-size", 64,
        "--max-text-tokens", 300, "--max-memory", 1.5, "--controlnet", "hed", "--force",
    )  # fmt: skip
    assert (outcome.code, outcome.out) == (0, "o\n")
    assert "transformer: export" in outcome.err
    (call,) = asked
    call.pop("progress")
    assert call == {
        "model": "a/b.pth", "out": Path("o"), "cfg_null": CfgNull.Y_EMBEDDING, "heads": 4,
        "max_text_tokens": 300, "controlnet": Path("hed"),
        "sample_size": 64, "max_memory": 3 * 2**29, "memory": None, "force": True,
        "config": EngineConfig(
            resolution=512, backend="tensorrt-rtx", precision=Precision.BF16,
            text_precision=Precision.FP32, max_batch=3, targets=("sm80", "sm89"),
            components=("text_encoder", "vae_decoder"), text_encoder_backend="torch",
        ),
    }  # fmt: skip


def test_plugins_arrive(run: Callable[..., Any], asked: list[dict[str, Any]]) -> None:
    words = ["--model", "tiny", "--backend", "tensorrt-rtx", "--target", "sm80"]
    assert run("build", *words, "--plugins").code == run("build", *words).code == 0
    assert [call["config"].plugins for call in asked] == [True, False]


@pytest.mark.parametrize(
    ("options", "model", "out", "components"),
    [
        ([], "PixArt-alpha/PixArt-XL-2-1024-MS", "PixArt-XL-2-1024-MS-1024", COMPONENTS),
        (["--res", 256], "PixArt-alpha/PixArt-XL-2-256x256", "PixArt-XL-2-256x256-256", COMPONENTS),
        (["--model", "tiny"], "tiny", "tiny-1024", COMPONENTS),
        (["--model", "x/my.pth"], "x/my.pth", "my-1024", ("transformer",)),
        (["--model", "xl-random"], "xl-random", "xl-random-1024", ("transformer", "vae_decoder")),
    ],
)
def test_defaults(
    run: Callable[..., Any], asked: list[dict[str, Any]], options: list[object], model: str,
    out: str, components: tuple[str, ...],
) -> None:  # fmt: skip
    assert run("build", "--backend", "torch", *options).code == 0
    (call,) = asked
    assert (call["model"], call["out"]) == (model, Path("engines") / out)
    assert call["config"].components == components


def test_a_tensorrt_build_takes_half_precision_by_default(
    run: Callable[..., Any], asked: list[dict[str, Any]]
) -> None:
    run("build", "--model", "tiny", "--backend", "tensorrt-rtx", "--target", "sm80")
    config = asked[0]["config"]
    assert (config.precision, config.text_precision) == (Precision.FP16, Precision.BF16)


def test_auto_says_what_it_took_and_why(
    run: Callable[..., Any], asked: list[dict[str, Any]]
) -> None:
    from pixart_rt.backends import choose_backend

    outcome = run("build", "--model", "tiny")
    name, reason = choose_backend()
    assert asked[0]["config"].backend == name
    assert reason in outcome.err


def test_a_second_build_is_found_and_says_so(
    run: Callable[..., Any], bundle_256: Path, pipeline_folder: Callable[..., Path]
) -> None:
    outcome = run(
        "build", "--model", pipeline_folder(32), "--res", 256, "--out", bundle_256, "--json",
        "--backend", "onnxruntime", "--precision", "fp32", "--text-precision", "fp32",
        "--max-batch", 2,
    )  # fmt: skip
    result = json.loads(outcome.out)
    assert result["cached"] is True
    assert result["key"] == Manifest.read(bundle_256).key
    assert set(result["components"]) == set(COMPONENTS)
    assert "nothing to do" in outcome.err
