"""Norms and rotary positions of q and k in one launch, on the GPU that is here (Metal or CUDA)."""

import mlx.core as mx
import pytest

from draftloom.kernels import qk_norm_rope
from draftloom.kernels.check import difference
from draftloom.kernels.qk_norm_rope import Rotation, checks
from draftloom.kernels.qk_norm_rope.launch import Launcher

pytestmark = pytest.mark.gpu

NAME = "metal" if mx.metal.is_available() else "cuda"


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "array"])
@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_place(case, on_device):
    """Outputs begin as NaN."""
    rows, heads, norms, rope = case.arrays()
    with mx.stream(mx.cpu):
        truth = qk_norm_rope.reference.place(rows, heads, norms, rope, case.offset)
        mx.eval(truth)
    offset = mx.array(case.offset) if on_device else case.offset
    launcher = Launcher(getattr(qk_norm_rope, NAME).BACKEND, poison=float("nan"))
    found = launcher.place(rows, heads, norms, Rotation(rope, offset))
    for mine, theirs in zip(found, truth, strict=True):
        assert difference(mine, theirs) <= checks.TOLERANCE[case.dtype]
