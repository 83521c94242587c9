"""Which variant runs: the arithmetic of the choice, with clocks and engines that are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pixart_rt.backends.component import Availability
from pixart_rt.bundle import ComponentEntry, Manifest, Measurement, PluginVariant, hash_files
from pixart_rt.config import ModelConfig
from pixart_rt.errors import BackendError, BundleError
from pixart_rt.export import plugin_choice
from pixart_rt.export.plugin_choice import (
    choose_in_bundle,
    compare,
    measure,
    random_inputs,
    without_slower,
)

GPU = "NVIDIA GeForce RTX 4090"
PLAIN, PLUGINS = "transformer/model.engine", "transformer/model-plugins.engine"


class FakeClock:
    """Milliseconds from a list for each of the two calls, which it also runs."""

    def __init__(self, times):
        self.times = {name: list(values) for name, values in times.items()}

    def __call__(self, call):
        values = self.times[call()]
        values.append(values.pop(0))
        return values[-1]


def test_the_medians_of_runs_in_turns():
    order = []

    def call(name):
        return lambda: order.append(name) or name

    clock = FakeClock({"plain": [5, 1, 9], "plugins": [4, 4, 100]})
    assert compare(call("plain"), call("plugins"), clock) == (5, 4)
    warm = 2 * plugin_choice.WARM_UP
    assert order[warm:] == ["plain", "plugins"] * plugin_choice.ROUNDS
    assert len(order) == warm + 2 * plugin_choice.ROUNDS


@pytest.mark.parametrize(
    ("offset", "times", "right", "faster"),
    [
        (0.0, (10.0, 9.0), True, True),
        (0.0, (9.0, 10.0), True, False),
        (0.001, (10.0, 9.0), True, True),  # within half precision's bounds
        (0.5, (10.0, 9.0), False, False),
        (float("nan"), (10.0, 9.0), False, False),
    ],
    ids=["faster", "slower", "rounded", "wrong", "nan"],
)
def test_only_a_right_and_faster_variant_is_chosen(offset, times, right, faster):
    x = torch.randn(2, 50)
    clock = lambda call: times[int(call() is not x)]  # noqa: E731
    found = measure(lambda x: x, lambda x: x + offset, {"x": x}, "fp16", clock)
    assert (found.plain, found.plugins) == times
    assert (found.right, found.faster) == (right, faster)
    assert found.shapes == {"x": [2, 50]}


def test_random_inputs_have_the_tuned_shape_and_leave_no_row_without_text():
    usual = {"tokens": (2, 40, 16), "prompt_mask": (50, 20)}
    engine = SimpleNamespace(
        profiles=[{name: ((1,), shape, (9,)) for name, shape in usual.items()}],
        dtypes={"tokens": torch.float32, "prompt_mask": torch.bool},
    )
    inputs = random_inputs(engine, torch.device("cpu"))
    assert {name: tuple(each.shape) for name, each in inputs.items()} == usual
    assert inputs["tokens"].std() > 0.5
    mask = inputs["prompt_mask"]
    assert mask.dtype == torch.bool and mask.any(1).all() and not mask.all()


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle with both engines, for the GPU that this machine pretends to have."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(plugin_choice, "capability", lambda device: "sm89")
    folder = tmp_path / "b"
    (folder / "transformer").mkdir(parents=True)
    for name in (PLAIN, PLUGINS):
        (folder / name).write_bytes(name.encode())
    entry = ComponentEntry(
        backend="tensorrt-rtx", precision="fp16", parts=(PLAIN,), targets=("sm89",),
        files=hash_files(folder, [folder / PLAIN, folder / PLUGINS]),
        plugins=PluginVariant(parts=(PLUGINS,), parity={}),
    )  # fmt: skip
    manifest = Manifest(
        pixart_rt_version="0", key="k", created="", model={}, model_config=ModelConfig().to_dict(),
        engine_config={}, components={"transformer": entry}, files={}, vae={},
        scheduler="dpm-solver++", buckets=[], versions={}, build={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def measured(entry, plain, plugins, gpu=GPU):
    found = Measurement(plain=plain, plugins=plugins, right=True, difference="", shapes={}, date="")
    return replace(entry, plugins=replace(entry.plugins, measured={gpu: found}))


@pytest.mark.parametrize(
    ("times", "targets", "stays"),
    [
        ((10.0, 9.0), ("sm89",), True),
        ((9.0, 10.0), ("sm89",), False),
        ((9.0, 10.0), ("sm80", "sm89"), True),  # another GPU may find otherwise
    ],
)
def test_a_slower_engine_that_no_other_gpu_could_use_is_removed(bundle, times, targets, stays):
    entry = replace(Manifest.read(bundle).components["transformer"], targets=targets)
    kept = without_slower(bundle, measured(entry, *times))
    assert (bundle / PLUGINS).exists() is stays
    assert (bundle / PLAIN).exists()
    assert set(kept.files) == ({PLAIN, PLUGINS} if stays else {PLAIN})
    assert kept.plugins.parts == ((PLUGINS,) if stays else ())
    assert kept.plugins.measured[GPU].plain == times[0], "what was measured stays"


def test_a_bundle_keeps_what_was_measured(bundle, monkeypatch):
    """Two GPUs, one after the other; the bundle's files and key stay as they were."""
    before = json.loads((bundle / "manifest.json").read_text())
    available = Availability(True, "")
    monkeypatch.setattr(plugin_choice.TensorRTBackend, "available", lambda self: available)
    for gpu, times in ((GPU, (10.0, 9.0)), ("NVIDIA A100", (9.0, 10.0))):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None, gpu=gpu: gpu)

        def choose(folder, manifest, name, gpu=gpu, times=times):
            entry = manifest.components[name]
            new = measured(entry, *times, gpu=gpu)
            new.plugins.measured.update(entry.plugins.measured)
            return new

        monkeypatch.setattr(plugin_choice, "choose", choose)
        assert choose_in_bundle(bundle)["transformer"].plain == times[0]
    manifest = Manifest.read(bundle)
    variant = manifest.components["transformer"].plugins
    assert variant.faster_on(GPU) and not variant.faster_on("NVIDIA A100")
    assert not variant.faster_on("another")
    after = json.loads(manifest.to_json())
    after["components"]["transformer"]["plugins"]["measured"] = {}
    assert after == before
    assert oct((bundle / "manifest.json").stat().st_mode)[-3:] == "644"


def test_a_damaged_measurement_is_a_damaged_manifest(bundle):
    path = bundle / "manifest.json"
    values = json.loads(path.read_text())
    values["components"]["transformer"]["plugins"]["measured"] = {GPU: {"plain": 1.0}}
    path.write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"damaged .* build the bundle again"):
        Manifest.read(bundle)


def test_a_bundle_without_plugins(bundle_256: Path):
    with pytest.raises(BundleError, match="holds no engines with plugins; build it with --plugins"):
        choose_in_bundle(bundle_256)


def test_where_engines_do_not_run_nothing_is_measured(bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"nothing was measured: .*no NVIDIA GPU"):
        choose_in_bundle(bundle)


@pytest.mark.gpu
def test_both_engines_are_timed_on_the_gpu(pipeline_folder, tmp_path):
    """A build where the engines run: measured, right, and the manifest's choice is loadable."""
    from pixart_rt.backends import get_backend
    from pixart_rt.config import EngineConfig, Precision
    from pixart_rt.export.build import build
    from pixart_rt.export.numerics import verify_bundle

    library = next(
        (name for name in ("tensorrt-rtx", "tensorrt") if get_backend(name).available().ok), None
    )
    if library is None:
        pytest.skip("neither library runs here")
    config = EngineConfig(
        resolution=256, backend=library, precision=Precision.FP16, components=("transformer",),
        plugins=True,
    )  # fmt: skip
    path = build(str(pipeline_folder(32)), tmp_path / "b", config).path
    variant = Manifest.read(path).components["transformer"].plugins
    found = variant.measured[torch.cuda.get_device_name()]
    assert found.right and found.plain > 0 and found.plugins > 0
    assert bool(variant.parts) is found.faster, "the only GPU it is for: kept only if faster"
    assert all(check.ok for check in verify_bundle(path))
