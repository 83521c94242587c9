"""What the operators have in common: the self-test, launching, tuning tables."""

from __future__ import annotations

import json

import pytest
import torch

from pixart_rt.kernels import catalog, launch, ln_modulate, tuning


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """Nothing refused, nothing remembered, and an empty user cache."""
    monkeypatch.setattr(launch, "_refused", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for memory in (catalog.self_test, launch._user_table, launch.shipped_table):
        memory.cache_clear()
    yield
    for memory in (catalog.self_test, launch._user_table, launch.shipped_table):
        memory.cache_clear()


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
    assert launch.config("op", like, 100, default) == default
    shipped = {"op": {"float16": {"512": {"ROWS": 1}, "2048": {"ROWS": 2}}}}
    (tmp_path / "sm90.json").write_text(json.dumps({"operators": shipped}))
    launch.shipped_table.cache_clear()
    for tokens, rows in ((10, 1), (512, 1), (2047, 1), (2048, 2), (10**6, 2)):
        found = launch.config("op", like, tokens, default)
        assert found == {"ROWS": rows, "num_warps": 8}
    assert launch.config("other", like, 512, default) == default
    assert launch.config("op", like.float(), 512, default) == default


def test_token_buckets_are_powers_of_two():
    assert [launch.token_bucket(n) for n in (0, 1, 2, 3, 512, 1023)] == [1, 1, 2, 2, 512, 512]
