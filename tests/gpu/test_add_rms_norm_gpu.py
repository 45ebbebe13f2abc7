"""A residual addition and the norm behind it in one launch, on the GPU that is here."""

import mlx.core as mx
import pytest

from draftloom.kernels import add_rms_norm
from draftloom.kernels.add_rms_norm import checks
from draftloom.kernels.add_rms_norm.launch import Launcher
from draftloom.kernels.check import difference

pytestmark = pytest.mark.gpu

NAME = "metal" if mx.metal.is_available() else "cuda"


@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_add_norm(case):
    """Outputs begin as NaN."""
    x, y, norm = case.arrays()
    with mx.stream(mx.cpu):
        truth = add_rms_norm.reference.add_norm(x, y, norm)
        mx.eval(truth)
    launcher = Launcher(getattr(add_rms_norm, NAME).BACKEND, poison=float("nan"))
    total, normed = launcher.add_norm(x, y, norm)
    assert mx.array_equal(total, x + y)
    assert difference(normed, truth[1]) <= checks.TOLERANCE[case.dtype]
