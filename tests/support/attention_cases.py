"""Calls of verify attention, and what is right: for the emulated tests and those on a GPU."""

from __future__ import annotations

import mlx.core as mx

from draftloom.kernels.verify_attention import reference
from draftloom.kernels.verify_attention.checks import Case

__all__ = ["CASES", "TOLERANCE", "Case", "error", "poisoned", "truth"]

TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
"""Relative error (norm of the difference over norm) against the float32 reference. Outputs and, in
the kernels, softmax weights are rounded to the dtype of q."""

CASES = (
    Case(mx.float32, (2, 2), 1, (1,), 3, 64),  # a first token
    Case(mx.bfloat16, (4, 1), 1, (77,), 128, 128),  # plain decoding
    Case(mx.float32, (4, 2), 5, (41,), 64, 64),
    Case(mx.bfloat16, (4, 1), 16, (70,), 80, 256),  # the shape of the bar: 64 packed rows
    Case(mx.float32, (4, 1), 9, (50,), 50, 256, sinks=True),
    Case(mx.float16, (6, 2), 7, (63, 40, 7), 96, 128, sinks=True),
    Case(mx.bfloat16, (8, 1), 13, (90, 61), 97, 64, window=11),  # 104 rows: two threadgroups
    Case(mx.float16, (2, 1), 32, (129,), 160, 64, window=40, sinks=True),
    Case(mx.bfloat16, (3, 1), 11, (65,), 300, 128, window=1),
)
"""Odd lengths, one row and many, keys that fill their buffer and keys that do not."""


def poisoned(case: Case, keys: mx.array) -> mx.array:
    """Keys or values with NaN past the valid ones."""
    lengths = mx.array(case.lengths)[:, None, None, None]
    valid = mx.arange(case.allocated)[:, None] < lengths
    return mx.where(valid, keys, mx.array(float("nan"), keys.dtype))


def truth(case: Case) -> mx.array:
    """The reference on the CPU, on the very inputs that the device gets: [B, Hq, M, D] float32."""
    q, k, v, sinks = case.arrays()
    mx.eval(q, k, v, sinks)
    with mx.stream(mx.cpu):
        exact = reference.attend(
            q, k, v, mx.array(case.lengths), scale=case.scale, window=case.window, sinks=sinks
        )
        mx.eval(exact)
    return exact


def error(found: mx.array, exact: mx.array) -> float:
    """Relative error; NaN counts as infinite."""
    with mx.stream(mx.cpu):
        gap = found.astype(mx.float32) - exact
        size = mx.sqrt((gap * gap).sum() / (exact * exact).sum()).item()
    return float(size) if size == size else float("inf")
