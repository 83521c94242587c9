"""What quack's GEMM is given, with a stand-in for it: quack itself needs a GPU."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from pixart_rt.kernels import launch, linear, quack_linear


@pytest.fixture
def calls(monkeypatch):
    """A package that computes what quack documents; the list of its calls' arguments."""
    made = []

    def gemm_epilogue(ops):
        def decorate(function):
            def gemm(a, b, c, **rows):
                made.append(rows)
                l, m, k = a.shape
                assert b.shape[:2] == (l, k) and c.shape == (l, m, b.shape[2])
                assert ops.keys() == rows.keys()
                assert all(ops[name] == ("row", name) for name in rows)
                assert all(row.shape == (l, b.shape[2]) for row in rows.values())
                wide = {name: row[:, None].double() for name, row in rows.items()}
                out = function(a.double() @ b.double(), c.double(), **wide)
                return {"D": out["D"].to(a.dtype)}

            return gemm

        return decorate

    root, epilogue, ops = (
        types.ModuleType(name) for name in ("quack", "quack.epilogue", "quack.epilogue.ops")
    )
    root.__spec__ = importlib.machinery.ModuleSpec("quack", None)
    epilogue.gemm_epilogue, ops.RowVecLoad = gemm_epilogue, lambda name: ("row", name)
    for module in (root, epilogue, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    quack_linear._epilogues.cache_clear()
    yield made
    quack_linear._epilogues.cache_clear()


def tensors(N=37, O=200, dtype=torch.float16):
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, N, n, generator=random).to(dtype) for n in (144, O))
    weight = (torch.randn(O, 144, generator=random) / 12).to(dtype)
    bias, table = (torch.randn(*s, O, generator=random).to(dtype) for s in ((), (6,)))
    return x, weight, bias, table, torch.randn(3, 6, O, generator=random), 5, residual


@pytest.mark.parametrize("tokens", [37, 200])  # as many as outputs: rows look like columns
def test_the_formula_with_an_images_own_gate(tokens, calls, device, error):
    given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors(tokens)]
    with launch.choosing("linear_gate_residual", "quack"):
        gated = linear.linear_gate_residual(*given)
        plain = linear.linear_residual(*given[:3], given[-1])
    assert [sorted(rows) for rows in calls] == [["bias_n", "gate_n"], ["bias_n"]]
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in tensors(tokens)]
    assert error(gated, linear.linear_gate_residual_ref(*wide)) < 1.5e-3
    expected = linear.linear_gate_residual_ref(*wide[:3], None, None, 0, wide[-1])
    assert error(plain, expected) < 1.5e-3


def test_ours_runs_where_quack_has_no_form(calls, device, error):
    """Training, roundings of the unfused model, float32, and a residual of another dtype."""
    x, weight, bias, table, shared, row, residual = (
        t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors()
    )
    rest = (table, shared, row)
    expected = linear.linear_gate_residual(x, weight, bias, *rest, residual)
    with launch.choosing("linear_gate_residual", "quack"):
        leaf = residual.clone().requires_grad_()
        outs = [
            linear.linear_gate_residual(x, weight, bias, *rest, leaf).detach(),
            linear.linear_gate_residual(x, weight, bias, *rest, residual, True),
            linear.linear_gate_residual(x, weight, bias, *rest, residual.float()),
            linear.linear_gate_residual(
                x.float(), weight.float(), bias.float(), *rest, residual.float()
            ),
        ]
    assert calls == []
    for out in outs:
        assert error(out, expected) < 2e-3


def test_without_quack_ours_runs_and_one_warning_says_so(device, monkeypatch):
    monkeypatch.setattr(quack_linear.importlib.util, "find_spec", lambda name: None)
    given = [t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors()]
    expected = linear.linear_gate_residual(*given)
    quack_linear._epilogues.cache_clear()
    with launch.choosing("linear_gate_residual", "quack"), pytest.raises(launch.Unavailable):
        linear.linear_gate_residual(*given)
    monkeypatch.setattr(launch, "_told", set())
    monkeypatch.setattr(linear, "choice", lambda *_: "quack")  # as a table names it on a GPU
    with pytest.warns(RuntimeWarning, match=r"quack-kernels is not installed"):
        actual = linear.linear_gate_residual(*given)
    again = linear.linear_gate_residual(*given)  # a second warning is an error here
    assert torch.equal(actual, expected) and torch.equal(again, expected)
