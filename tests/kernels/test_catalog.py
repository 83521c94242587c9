"""What the operators have in common: the self-test, launching, tuning tables."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pixart_rt.kernels import catalog, launch, ln_modulate, tuning


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """Nothing refused, nothing remembered, and an empty user cache."""
    monkeypatch.setattr(launch, "_refused", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    catalog.self_test.cache_clear()
    launch.forget_tables()
    yield
    catalog.self_test.cache_clear()
    launch.forget_tables()


# Weights of keys past the image may overflow float16; they reach only rows that are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("operator", catalog.OPERATORS, ids=lambda each: each.name)
def test_kernels_agree_with_their_references(operator, device):
    """What the self-test does on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    assert catalog.worst_error(operator, device, dtype, seed=3) <= 1


def test_the_self_test_refuses_a_kernel_that_differs(clean, monkeypatch, device):
    wrong = launch.Operator(
        "wrong", launch.SM70, lambda x: x + 1, lambda x: x + 2,
        lambda device, dtype, seed: (torch.ones(3, device=device, dtype=dtype),), trains=False,
    )  # fmt: skip
    monkeypatch.setattr(catalog, "OPERATORS", (wrong,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    with pytest.warns(RuntimeWarning, match="wrong is not used on a GPU"):
        assert catalog.self_test(device, torch.float16) == ("wrong",)
    assert ("wrong", device.index or 0) in launch.refused()


def test_the_self_test_refuses_a_kernel_that_fails(clean, monkeypatch, device):
    def fail(*_):
        raise RuntimeError("ptxas fatal\nmore")

    broken = launch.Operator("broken", launch.SM70, fail, fail, lambda *_: ())
    monkeypatch.setattr(catalog, "OPERATORS", (broken,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    with pytest.warns(RuntimeWarning, match="ptxas fatal; PyTorch"):
        assert catalog.self_test(device, torch.float16) == ("broken",)


def test_nan_is_an_error(device):
    nan = torch.full((3,), torch.nan, device=device)
    operator = launch.Operator(
        "nan", launch.SM70, lambda: nan, lambda: torch.ones(3), lambda *_: (), trains=False
    )
    error = catalog.worst_error(operator, torch.device("cpu"), torch.float32, 0)
    assert not error <= 1


def test_a_wrong_gradient_is_an_error(device):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return dy

    operator = launch.Operator(
        "gradient", launch.SM70, Wrong.apply, lambda x: 2 * x, lambda *_: (torch.ones(3),)
    )
    assert catalog.worst_error(operator, device, torch.float32, 0) > 1


def test_a_launch_is_recorded_and_not_run(device):
    x = torch.randn(1, 5, 72, device=device)
    table, shared = torch.randn(6, 72, device=device), torch.randn(1, 6, 72, device=device)
    with launch.record((8, 0)) as recorded:
        y, *_ = ln_modulate.ln_modulate_triton(x, table, shared, 0)
        assert launch.capability(x) == (8, 0)
    assert [each.kernel for each in recorded] == [ln_modulate._ln_modulate_kernel]
    assert recorded[0].kwargs["D"] == 72
    assert y.isnan().all()  # not written: fresh memory is poisoned in these tests


def test_tuning_finds_the_fastest_and_ignores_wrong_results(device):
    times = {1: 3.0, 2: 1.0, 4: 2.0, 8: 0.5}

    def make(B, N, device, dtype):
        def call():
            rows = launch._forced.get("subject", {}).get("ROWS", 1)
            call.rows = rows
            return torch.full((3,), 7.0 if rows == 8 else 5.0)  # 8 is fast and wrong

        return call

    subject = tuning.Subject("subject", tuning.grid(ROWS=(2, 4, 8)), make)
    table = tuning.tune(
        device, torch.float16, shapes=[(2, 256), (2, 1024)], subjects=[subject],
        timer=lambda call: times[(call(), call.rows)[1]],
    )  # fmt: skip
    assert table["operators"] == {"subject": {"float16": {"512": {"ROWS": 2}, "2048": {"ROWS": 2}}}}


@pytest.mark.parametrize("subject", tuning.SUBJECTS, ids=lambda each: each.op)
def test_every_subject_obeys_its_table(subject, device):
    """Each candidate key is one that the launch takes: the recorded launch has the value."""
    candidate = subject.candidates[-1]
    call = subject.make(1, 17, device, torch.float16)
    with launch.forcing(subject.op, candidate), launch.record((9, 0)) as recorded:
        call()
    assert any(candidate.items() <= each.kwargs.items() for each in recorded)


def test_tables_are_found_by_gpu_then_by_family(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16)
    default = {"ROWS": 4, "num_warps": 8}
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    assert launch.config("op", like, (2, 100), default) == default
    shapes = {"2x512": {"ROWS": 1}, "2x2048": {"ROWS": 2}, "64x512": {"ROWS": 8}}
    shipped = {"op": {"float16": shapes}}
    (tmp_path / "sm90.json").write_text(json.dumps({"operators": shipped}))
    launch.forget_tables()
    nearest = {(2, 10): 1, (2, 512): 1, (3, 600): 1, (2, 1023): 1, (2, 1025): 2, (2, 10**6): 2,
               (64, 400): 8, (16, 512): 8}  # fmt: skip
    for shape, rows in nearest.items():
        found = launch.config("op", like, shape, default)
        assert found == {"ROWS": rows, "num_warps": 8}, shape
    assert launch.config("other", like, (2, 512), default) == default
    assert launch.config("op", like.float(), (2, 512), default) == default


def test_the_nearest_shape_is_by_factors_and_equals_go_to_the_smaller():
    shapes = [(512, 1152), (2048, 1152), (2048, 4608)]
    assert launch.nearest(shapes, (1000, 1152)) == (512, 1152)
    assert launch.nearest(shapes, (1024, 1152)) == (512, 1152)  # a factor 2 either way
    assert launch.nearest(shapes, (1100, 1152)) == (2048, 1152)
    assert launch.nearest(shapes, (512, 4608)) == (512, 1152)
    assert launch.nearest(shapes, (0, 1)) == (512, 1152)


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: `launch` makes it that of the tensors."""
    current, launched = [0], []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((current[0], grid, kwargs))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    with FakeTensorMode():
        here = torch.empty(3, device="cuda:0")
        there = torch.empty(3, device="cuda:1")
        descriptor = SimpleNamespace(base=there)
        for args in ((there,), (7, there), (descriptor, 1), ((None, (descriptor,)), 2)):
            launch.launch(Kernel(), (4,), *args, BLOCK=2)
        launch.launch(Kernel(), (4,), here)
    launch.launch(Kernel(), (4,), torch.empty(3))
    assert [device for device, *_ in launched] == [1, 1, 1, 1, 0, 0]
    assert launched[0][1:] == ((4,), {"BLOCK": 2})
    assert current == [0]


def test_an_implementation_is_chosen_by_table_or_by_force(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16)
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    choices = {"op": {"float16": {"512": "own", "8192": "cublas"}}}
    (tmp_path / "sm90.json").write_text(json.dumps({"choices": choices}))
    assert launch.choice("op", like, (512,), "default") == "default"  # a CPU has no table
    with launch.record((9, 0)):
        assert launch.choice("op", like, (512,), "default") == "own"
        assert launch.choice("op", like, (8000,), "default") == "cublas"
        assert launch.choice("op", like.float(), (8000,), "default") == "default"
        with launch.choosing("op", "other"):
            assert launch.choice("op", like, (512,), "default") == "other"


def test_a_recording_knows_the_configurations_that_shapes_select(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16, device="meta")
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    shipped = {"op": {"float16": {"512": {"ROWS": 1}, "2048": {"ROWS": 2}}}}
    (tmp_path / "sm80.json").write_text(json.dumps({"operators": shipped}))
    own = {"op": {"float16": {"512": {"ROWS": 16}}}}
    path = launch.user_table_path("A GPU")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"operators": own}))
    with launch.record((8, 0)) as recorded:
        for rows in (512, 600, 4096):
            launch.config("op", like, (rows,), {"num_warps": 4})
    assert recorded.configurations == {
        "op": [{"num_warps": 4, "ROWS": 1}, {"num_warps": 4, "ROWS": 2}]
    }
    with launch.record((8, 0), gpu="A GPU") as recorded:
        launch.config("op", like, (4096,), {"num_warps": 4})
    assert recorded.configurations == {"op": [{"num_warps": 4, "ROWS": 16}]}
