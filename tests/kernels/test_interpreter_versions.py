"""Versions whose interpreter fails deep inside a kernel are refused before any test, in words."""

from __future__ import annotations

import pytest

from tests.conftest import interpreter_refuses


@pytest.mark.parametrize(
    ("triton", "numpy"), [("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.10.0", "3.0.0rc1")]
)
def test_these_work_together(triton: str, numpy: str) -> None:
    assert not interpreter_refuses(triton, numpy)


@pytest.mark.parametrize("numpy", ["2.4.0", "2.10.1", "3.0.0"])
def test_triton_3_6_does_not_work_with_a_new_numpy(numpy: str) -> None:
    reason = interpreter_refuses("3.6.0", numpy)
    assert f"NumPy {numpy}" in reason and "numpy<2.4" in reason and "triton>=3.7" in reason
