"""linear_gate_residual by a GEMM of quack-kernels (github.com/Dao-AILab/quack), if installed.

    residual + gate·(x·Wᵀ + b)

B images, N tokens, I inputs, O outputs. quack compiles the epilogue below into its own GEMM for
Hopper and later; an image is one of its batch, so that bias and gate are row vectors [B, O]. It is
used where a table names it (`launch.choice`, "quack"), in 16 bits and without gradients.

**It has never been run**: this package was written without a GPU, and quack needs one. The tests
check what quack is given, with a stand-in for it. `pip install 'pixart_rt[quack]'` installs it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from pixart_rt.kernels.gate_residual import Gate
from pixart_rt.kernels.launch import unavailable


def _gated(acc: Any, c: Any, bias_n: Any, gate_n: Any) -> dict[str, Any]:
    """quack's form of an epilogue; `c` is its name of the matrix that is added."""
    return {"D": c + gate_n * (acc + bias_n)}


def _added(acc: Any, c: Any, bias_n: Any) -> dict[str, Any]:
    return {"D": c + acc + bias_n}


@functools.cache
def _epilogues() -> tuple[Any, Any] | None:
    """quack's kernels with and without a gate; None if it is not installed."""
    if importlib.util.find_spec("quack") is None:
        return None
    from quack.epilogue import gemm_epilogue
    from quack.epilogue.ops import RowVecLoad

    # Named as row vectors, for with N = O quack cannot tell them from column vectors.
    bias, gate = RowVecLoad("bias_n"), RowVecLoad("gate_n")
    return (
        gemm_epilogue(ops={"bias_n": bias, "gate_n": gate})(_gated),
        gemm_epilogue(ops={"bias_n": bias})(_added),
    )


def gate_residual(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Gate | None, residual: Tensor
) -> Tensor | None:
    """residual + gate·(x·Wᵀ + b) [B, N, O]; None where quack cannot: use ours."""
    if x.dtype not in (torch.float16, torch.bfloat16) or residual.dtype != x.dtype:
        return None
    epilogues = _epilogues()
    if epilogues is None:
        why = "quack-kernels is not installed (pip install 'pixart_rt[quack]')"
        unavailable("linear_gate_residual", "quack", why)
        return None
    B, O = x.shape[0], weight.shape[0]
    rows = {"bias_n": bias.float().expand(B, O).contiguous()}
    if gate is not None:
        table, shared, row = gate
        rows["gate_n"] = table[row].float() + shared[:, row].float()
    product = epilogues[0 if gate is not None else 1]
    x, residual = x.contiguous(), residual.contiguous()
    out: Tensor = product(x, weight.t().expand(B, -1, -1), residual, **rows)["D"]
    return out
