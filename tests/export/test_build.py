"""The build: whole or absent, a hit for an equal key, a gate that fails and names a layer."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart_rt.bundle import Manifest, damaged_files
from pixart_rt.checkpoints import tensors
from pixart_rt.config import CfgNull, EngineConfig, ModelConfig, Precision
from pixart_rt.errors import BuildError, BundleError, CheckpointError, ConfigError, NumericsError
from pixart_rt.export import checkpoint_source, component_build
from pixart_rt.export.build import build, default_precision
from pixart_rt.export.checkpoint_source import open_source, random_transformer
from pixart_rt.export.component_spec import (
    part_bytes,
    predicted_peak,
    split_layers,
    vae_profiles,
)
from pixart_rt.export.numerics import difference, verify_bundle
from pixart_rt.model.dtypes import DTYPES
from pixart_rt.model.text_encoder import T5_XXL

TORCH_256 = EngineConfig(resolution=256, backend="torch")


@pytest.fixture
def folder(pipeline_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the random 256 px pipeline that a test may spoil."""
    return Path(shutil.copytree(pipeline_folder(32), tmp_path / "model"))


def edit_weights(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a transformer or text encoder folder."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_second_build_is_a_cache_hit(bundle_256: Path, pipeline_folder, caplog) -> None:
    before = (bundle_256 / "manifest.json").stat().st_mtime_ns
    config = EngineConfig(resolution=256, max_batch=2)
    result = build(str(pipeline_folder(32)), bundle_256, config)
    assert result.cached and "nothing to do" in result.notes[0]
    assert (bundle_256 / "manifest.json").stat().st_mtime_ns == before


def test_a_build_opens_every_weight_file_once(
    pipeline_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads each VAE and each ControlNet once: `read_vae` is diffusers' own loading."""
    opened: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *args: object, **kwargs: object) -> object:
            opened[f"{name} {Path(path).parent.name}/{Path(path).name}"] += 1
            return function(path, *args, **kwargs)

        return call

    source = pipeline_folder(32)
    for module, name in ((tensors, "safe_open"), (checkpoint_source, "read_vae")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    config = EngineConfig(resolution=256, backend="onnxruntime")
    build(str(source), tmp_path / "b", config)
    ours = {name: count for name, count in opened.items() if "/b" not in name}
    assert ours == {
        "safe_open transformer/diffusion_pytorch_model.safetensors": 1,
        "safe_open text_encoder/model.safetensors": 1,
        f"read_vae {source.name}/vae": 1,
    }


def test_another_key_or_a_damaged_file_builds_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    first = build(str(folder), out, TORCH_256)
    assert build(str(folder), out, TORCH_256).cached
    half = EngineConfig(resolution=256, backend="torch", precision=Precision.BF16)
    with pytest.raises(ConfigError, match=r"other settings \(precision fp32, not bf16\).*--force"):
        build(str(folder), out, half)
    assert Manifest.read(out) == first.manifest
    second = build(str(folder), out, half, force=True)
    assert not second.cached and second.manifest.key != first.manifest.key
    (out / "transformer" / "config.json").write_text("{}")
    third = build(str(folder), out, half)
    assert not third.cached and not damaged_files(out, third.manifest)
    edit_weights(folder / "transformer", "proj_out.bias", lambda t: t + 0.01)
    fourth = build(str(folder), out, half)  # no setting: the same model, trained on
    assert fourth.manifest.key != third.manifest.key and "is replaced" in fourth.notes[0]
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit_weights(other / "transformer", "proj_out.bias", lambda t: t + 0.01)
    with pytest.raises(ConfigError, match=r"other settings .model .*--force"):
        build(str(other), out, half)
    assert Manifest.read(out) == fourth.manifest


def test_weights_behind_links_are_part_of_the_key(folder: Path, tmp_path: Path) -> None:
    """And a bundle that was built into the model's folder is not."""
    shared = (folder / "transformer").rename(tmp_path / "shared")
    (folder / "transformer").symlink_to("../shared")
    one = open_source(str(folder), 256).weights_sha256
    (folder / "engine").mkdir()
    (folder / "engine" / "manifest.json").write_text("{}")
    (shared / "loop").symlink_to(".")
    assert open_source(str(folder), 256).weights_sha256 == one
    edit_weights(shared, "proj_out.bias", lambda t: t + 0.01)
    assert open_source(str(folder), 256).weights_sha256 != one


def test_what_a_user_put_into_a_bundle_is_never_lost(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    made = build(str(folder), out, TORCH_256)
    (out / "outputs").mkdir()
    (out / "outputs" / "my.png").write_text("mine")
    assert build(str(folder), out, TORCH_256).cached, "nothing is to be replaced"
    larger = EngineConfig(resolution=256, backend="torch", max_batch=2)
    for force in (False, True):
        with pytest.raises(ConfigError, match="holds outputs, which is not part of it"):
            build(str(folder), out, larger, force=force)
    assert (out / "outputs" / "my.png").read_text() == "mine"
    assert Manifest.read(out) == made.manifest


def test_files_that_the_manifest_does_not_list_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    """Weights of the first name that is looked for would win over those with a hash."""
    from pixart_rt import PixArtPipeline

    out = tmp_path / "b"
    made = build(str(folder), out, TORCH_256).manifest
    listed = next(name for name in made.all_files() if name.endswith("model.safetensors"))
    extra = (out / listed).with_name("diffusion_pytorch_model.safetensors")
    shutil.copy(out / listed, extra)
    (out / "notes.txt").write_text("mine, and nobody's business")
    name = extra.relative_to(out).as_posix()
    assert list(damaged_files(out, made)) == [name]
    with pytest.raises(BundleError, match=f"{name} is not listed in manifest.json"):
        PixArtPipeline.from_bundle(out, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["components"]["transformer"].update(parts=["../../x.onnx"]),
        lambda values: values["components"]["transformer"]["files"].update({"../x": "0"}),
        lambda values: values["files"].update({"/etc/passwd": "0"}),
    ],
)
def test_a_manifest_names_nothing_outside_its_bundle(
    bundle_256: Path, tmp_path: Path, change: Callable[[dict], object]
) -> None:
    values = json.loads((bundle_256 / "manifest.json").read_text())
    change(values)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="damaged"):
        Manifest.read(tmp_path)


def test_the_manifest_says_what_the_bundle_is(bundle_256: Path) -> None:
    manifest = Manifest.read(bundle_256)
    assert set(manifest.components) == {"text_encoder", "transformer", "vae_decoder"}
    on_disk = {
        path.relative_to(bundle_256).as_posix()
        for path in bundle_256.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert on_disk == set(manifest.all_files())
    assert len(manifest.buckets) == 40
    assert manifest.config.cfg_null is CfgNull.EMPTY_PROMPT
    for entry in manifest.components.values():
        assert entry.parity["finite"] and entry.parity["rms"] < 1e-4
        assert entry.parity["how"] == "engine run by onnxruntime"
    assert oct((bundle_256 / "transformer").stat().st_mode)[-3:] == "755"


@pytest.mark.parametrize("where", ["transformer", "text_encoder"])
def test_a_failed_build_leaves_everything_as_it_was(
    folder: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "b"
    good = build(str(folder), out, TORCH_256).manifest
    real = component_build.save_module

    def fail(place: Path, *arguments: object) -> None:
        if place.name == where:
            raise OSError(28, "No space left on device")
        real(place, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(component_build, "save_module", fail)
    with pytest.raises(OSError, match="No space"):
        build(
            str(folder), out, EngineConfig(resolution=256, backend="torch", max_batch=3), force=True
        )
    assert Manifest.read(out) == good and not damaged_files(out, good)
    assert os.listdir(out.parent) == ["b"], "nothing half-made stays next to it"


def test_a_folder_that_is_no_bundle_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="not a bundle"):
        build(str(folder), mine, TORCH_256)
    assert (mine / "thesis.txt").read_text() == "x"


def test_overflow_in_half_precision_fails_and_names_the_layer(folder: Path, tmp_path: Path) -> None:
    """Block 1's first MLP product leaves float16; block 0 is fine."""
    key = "transformer_blocks.1.ff.net.0.proj.weight"
    edit_weights(folder / "transformer", key, lambda t: t * 1e6)
    config = EngineConfig(resolution=256, precision=Precision.FP16, components=("transformer",))
    with pytest.raises(NumericsError, match=r"transformer in fp16 .*core\.blocks\.1 .*NaN or Inf"):
        build(str(folder), tmp_path / "b", config)
    assert not (tmp_path / "b").exists()


def test_a_wrong_engine_fails_the_gate_and_names_the_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is exported from a module whose block 1 was altered: float32 must notice."""
    real = component_build.export_onnx

    def spoil(graph, path):
        if graph.component == "transformer":
            graph.module.core.blocks[1].mlp.fc2.bias.data += 0.05
        real(graph, path)

    monkeypatch.setattr(component_build, "export_onnx", spoil)
    config = EngineConfig(resolution=256, components=("transformer",))
    with pytest.raises(
        NumericsError, match=r"transformer in fp32 .*first bad layer: core\.blocks\.1 "
    ):
        build(str(folder), tmp_path / "b", config)


def test_a_split_text_encoder_is_built_and_checked_in_parts(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(resolution=256, components=("text_encoder",))
    source = open_source(str(folder), 256)
    t5, dtype = source.text_config(), torch.float32
    limit = predicted_peak(part_bytes(t5, dtype, 0, 1)) + 1
    result = build(str(folder), tmp_path / "b", config, max_memory=limit)
    assert len(result.manifest.components["text_encoder"].parts) == 3
    assert "3 engines, predicted peak memory" in result.notes[0]
    checks = {check.name: check.ok for check in verify_bundle(tmp_path / "b")}
    assert checks == {"files": True, "text_encoder": True}


def test_t5_xxl_is_split_to_fit_and_refused_when_it_cannot() -> None:
    bf16 = torch.bfloat16
    whole = part_bytes(T5_XXL, bf16, 0, 24)
    assert 9.0e9 < whole < 9.6e9  # 4.76 billion parameters less the biases it does not have
    bounds = split_layers(T5_XXL, bf16, 20 << 30)
    assert len(bounds) > 1
    assert bounds[0][0] == 0 and bounds[-1][1] == 24
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert all(predicted_peak(part_bytes(T5_XXL, bf16, *b)) <= 20 << 30 for b in bounds)
    assert split_layers(T5_XXL, bf16, 64 << 30) == [(0, 24)]
    with pytest.raises(BuildError, match="--text-encoder torch"):
        split_layers(T5_XXL, bf16, 1 << 30)


def test_verify_finds_a_changed_weight(bundle_256: Path, tmp_path: Path) -> None:
    assert all(check.ok for check in verify_bundle(bundle_256))
    copy = Path(shutil.copytree(bundle_256, tmp_path / "copy"))
    path = copy / "vae_decoder" / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-8] + b"\x00\x00\xc0\x7f\x00\x00\xc0\x7f")
    checks = {check.name: check for check in verify_bundle(copy)}
    assert checks["files"].ok is False and "model.onnx.data is changed" in checks["files"].detail
    assert checks["vae_decoder"].ok is False and checks["transformer"].ok


def test_verify_runs_the_engine_and_sees_wrong_outputs(bundle_256: Path, tmp_path: Path) -> None:
    """With hashes made to fit, the stored reference still tells."""
    from pixart_rt.bundle import sha256

    copy = Path(shutil.copytree(bundle_256, tmp_path / "copy"))
    path = copy / "golden" / "transformer.safetensors"
    tensors = load_file(path)
    tensors["reference"] *= 1.01
    save_file(tensors, path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["golden/transformer.safetensors"] = sha256(path)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    checks = {check.name: check.ok for check in verify_bundle(copy)}
    assert checks == {
        "files": True,
        "text_encoder": True,
        "transformer": False,
        "vae_decoder": True,
    }


def test_text_encoder_may_stay_in_pytorch(folder: Path, tmp_path: Path) -> None:
    config = EngineConfig(
        resolution=256, text_encoder_backend="torch", text_precision=Precision.BF16,
        components=("text_encoder",),
    )  # fmt: skip
    entry = build(str(folder), tmp_path / "b", config).manifest.components["text_encoder"]
    assert (entry.backend, entry.precision) == ("torch", "bf16")
    assert all(check.ok for check in verify_bundle(tmp_path / "b"))


@pytest.mark.parametrize("ending", ["older", "damaged", "other"])
def test_a_manifest_of_another_version_is_refused(
    bundle_256: Path, tmp_path: Path, ending: str
) -> None:
    values = json.loads((bundle_256 / "manifest.json").read_text())
    text = {
        "older": json.dumps({**values, "format_version": 0}),
        "damaged": json.dumps(values)[:100],
        "other": json.dumps({"format_version": values["format_version"], "components": {}}),
    }[ending]
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="build"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        ("MODEL", EngineConfig(resolution=512), ConfigError, "is a 256 px model"),
        ("/no/such/folder", TORCH_256, CheckpointError, "no file or folder"),
        ("MODEL", EngineConfig(resolution=256, precision=Precision.BF16), ConfigError, "bfloat16"),
        ("MODEL", EngineConfig(resolution=256, targets=("sm80",)), ConfigError, "no targets"),
        (
            "MODEL",
            EngineConfig(resolution=256, backend="tensorrt-rtx", targets=("sm90",)),
            ConfigError,
            "sm80",
        ),
        ("xl-random", EngineConfig(), BuildError, "has no text_encoder"),
    ],
)
def test_impossible_builds_are_refused_before_they_start(
    folder: Path, tmp_path: Path, model: str, config: EngineConfig, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        build(str(folder) if model == "MODEL" else model, tmp_path / "b", config)
    assert not (tmp_path / "b").exists()


def test_y_embedding_convention_needs_the_tensor(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no y_embedding"):
        build(str(folder), tmp_path / "b", TORCH_256, cfg_null=CfgNull.Y_EMBEDDING)


def test_default_precisions_are_known_to_the_exporter() -> None:
    assert default_precision("tensorrt-rtx") == (Precision.FP16, Precision.BF16)
    assert set(DTYPES) == {str(p) for p in Precision}


def test_components_of_different_models_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "d_model": 48}))
    with pytest.raises(CheckpointError, match="48 channels, its transformer takes 32"):
        build(str(folder), tmp_path / "b", TORCH_256)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        build(str(folder), tmp_path / "b", TORCH_256)


def test_an_lcm_checkpoint_is_sampled_with_lcm(folder: Path, tmp_path: Path) -> None:
    from pixart_rt import PixArtPipeline

    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "LCMScheduler"}))
    bundle = build(str(folder), tmp_path / "b", TORCH_256)
    assert bundle.manifest.scheduler == "lcm"
    pipe = PixArtPipeline.from_bundle(bundle.path, "cpu")
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    default = pipe("a star", **arguments).images
    assert torch.equal(default, pipe("a star", scheduler="lcm", **arguments).images)
    with pytest.raises(ConfigError, match="between 1 and 50"):
        pipe("a star", num_inference_steps=51)


def test_random_weights_keep_activations_finite_in_half() -> None:
    from pixart_rt.export.onnx_export import transformer_inputs

    config = ModelConfig(num_layers=12, num_heads=4, caption_channels=64)
    inputs = transformer_inputs(config, batch=2, num_tokens=20)
    shared = [inputs[name] for name in ("tokens", "pos_embed", "modulation")]
    embeds = torch.randn(2, config.max_text_tokens, 64)
    outputs = []
    for dtype in (torch.float32, torch.float16):
        model = random_transformer(config, dtype)
        outputs.append(model(*shared, embeds, inputs["prompt_mask"]).float())
    found = difference(outputs[1], outputs[0])
    assert found.within("fp16"), str(found)


def test_vae_profiles_cover_every_bucket_without_one_huge_box() -> None:
    from pixart_rt.buckets import RESOLUTIONS, buckets

    for resolution in RESOLUTIONS:
        profiles = vae_profiles(EngineConfig(resolution=resolution))
        for bucket in buckets(resolution):
            inside = [
                profile
                for profile in profiles
                if profile["latent_height"][0] <= bucket.height // 8 <= profile["latent_height"][2]
                and profile["latent_width"][0] <= bucket.width // 8 <= profile["latent_width"][2]
            ]
            assert inside, bucket
        largest = max(p["latent_height"][2] * p["latent_width"][2] for p in profiles)
        assert largest <= 2 * (resolution // 8) ** 2


def test_difference_counts_nan_as_infinite_error() -> None:
    reference = torch.randn(5, 7)
    spoiled = reference.clone()
    spoiled[2, 3] = float("nan")
    found = difference(spoiled, reference)
    assert not found.finite and not found.within("bf16")
    assert difference(reference, reference).within("fp32")
    shifted = reference.clone()
    shifted[0, 0] += reference.std() * 2e-3
    assert not difference(shifted, reference).within("fp32"), "one wrong element is enough"
