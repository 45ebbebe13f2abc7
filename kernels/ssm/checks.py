"""Parity checks of Mamba-2's rule, on the default device: the outputs and the state of an order of
steps, and the state that replay rebuilds from the tape for every row's own count.

Tolerance: 1e-4 of the largest value; over a block mlx-lm multiplies matrices, which run in TF32 on
CUDA (2e-2). Inputs are float32: mlx-lm's step keeps its state in the type it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.ssm import compute_dt, ssm_update

from draftloom.device import on_cuda
from draftloom.kernels.check import Check

from . import reference
from .array import replay, tape_of

__all__ = ["SHAPES", "checks_of"]

SHAPES = ((1, 1, 4, 2, 16, 32), (2, 5, 4, 1, 16, 32), (3, 16, 8, 4, 32, 64))
"""B, T, H, G, Dh, Ds."""
LIMIT = (0.001, 100.0)


def checks_of(order: Any) -> Iterator[Check]:
    """All checks of an order of steps."""
    for shape in SHAPES:
        yield _check(order, shape)


def _check(order: Any, shape: tuple[int, ...]) -> Check:
    rows, tokens, heads, groups, size, state_size = shape
    keys = iter(mx.random.split(mx.random.key(11), 8))

    def normal(*sizes: int) -> mx.array:
        return mx.random.normal(sizes, key=next(keys))

    x = normal(rows, tokens, heads, size)
    b, c = (normal(rows, tokens, groups, state_size) for _ in range(2))
    dt, state = normal(rows, tokens, heads), normal(rows, heads, size, state_size)
    bias, skip, a_log = normal(heads), normal(heads), 0.3 * normal(heads)
    counts = [(tokens, 0, tokens // 2)[row % 3] for row in range(rows)]

    def found() -> list[mx.array]:
        held = {"state": state}

        def step(
            x: mx.array, b: mx.array, c: mx.array, dt: mx.array, cache: Any, mask: Any
        ) -> mx.array:
            y, held["state"] = ssm_update(
                x, a_log, b, c, skip, dt, bias, held["state"], LIMIT, mask
            )
            return y

        y = order(step, (x, b, c, dt), None, None)
        tape = tape_of(x, b, dt, bias, a_log, LIMIT)
        return [y, held["state"], replay(state, tape, mx.array(counts))]

    def expected() -> list[mx.array]:
        steps = compute_dt(dt, bias, LIMIT)
        y, states = reference.run(x, b, c, steps, -mx.exp(a_log), skip, state)
        rebuilt = mx.stack([states[row, n] for row, n in enumerate(counts)])
        return [y, states[:, -1], rebuilt]

    tolerance = 2e-2 if on_cuda() else 1e-4
    label = f"verify and replay float32 B{rows} T{tokens} H{heads} G{groups} {size}x{state_size}"
    return Check(label, found, expected, (tolerance,) * 3)
