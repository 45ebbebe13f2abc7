"""Parity checks of an implementation of verify attention, on the default device.

Tolerances (largest difference over the largest value): outputs are rounded to the dtype of q, and
so are the softmax weights in the kernels; MLX's own attention rounds scores too, and multiplies in
TF32 on CUDA. What lies past the valid keys is NaN for kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import mlx.core as mx

from draftloom.device import on_cuda, on_gpu
from draftloom.kernels.check import Check

from . import reference
from .dispatch import attend, choose
from .launch import Request

__all__ = ["CASES", "KERNEL_CASES", "Case", "checks_of"]

ROUNDING = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
"""By the dtype of q."""
TF32 = 1.6e-2


@attrs.frozen
class Case:
    """A shape to check.

    Attributes:
        dtype: of queries, keys and values.
        heads: Hq, Hkv.
        queries: M.
        lengths: valid keys of each row of the batch.
        allocated: N.
        size: D.
        window: or None.
        sinks: whether there are some.
    """

    dtype: mx.Dtype
    heads: tuple[int, int]
    queries: int
    lengths: tuple[int, ...]
    allocated: int
    size: int
    window: int | None = None
    sinks: bool = False

    def __str__(self) -> str:
        kind, lengths = str(self.dtype).rpartition(".")[2], "+".join(map(str, self.lengths))
        heads = f"Hq{self.heads[0]} Hkv{self.heads[1]}"
        name = f"{kind} {heads} M{self.queries} N{lengths} of {self.allocated} D{self.size}"
        name += f" window {self.window}" if self.window else ""
        return name + (" sinks" if self.sinks else "")

    @property
    def scale(self) -> float:
        """The usual factor on the scores."""
        return float(self.size**-0.5)

    def request(self) -> Request:
        """What a call with this case asks."""
        gpu = on_gpu()
        shape = (len(self.lengths), self.queries, *self.heads, self.size)
        return Request(self.dtype, *shape, "gpu" if gpu else "cpu", self.window, self.sinks)

    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """q, keys, values; sinks or None."""
        seeds = iter(mx.random.split(mx.random.key(11), 4))
        rows, (heads, key_heads) = len(self.lengths), self.heads

        def normal(count: int, tokens: int) -> mx.array:
            shape = (rows, count, tokens, self.size)
            return mx.random.normal(shape, key=next(seeds)).astype(self.dtype)

        q = 2 * normal(heads, self.queries)  # weights that differ
        k, v = (normal(key_heads, self.allocated) for _ in "kv")
        sinks = mx.random.normal((heads,), key=next(seeds)).astype(self.dtype)
        return q, k, v, sinks if self.sinks else None


CASES = (
    Case(mx.float32, (2, 2), 1, (1,), 3, 64),
    Case(mx.float32, (4, 2), 5, (41,), 64, 128),
    Case(mx.bfloat16, (4, 1), 1, (77,), 128, 256),
    Case(mx.bfloat16, (32, 8), 16, (700,), 768, 256),  # more than one tile a part
    Case(mx.bfloat16, (16, 2), 13, (90, 61), 97, 128, window=11),
    Case(mx.float16, (6, 2), 7, (63, 40, 7), 96, 128, sinks=True),
    Case(mx.float16, (2, 1), 32, (129,), 160, 64, window=40, sinks=True),
)
KERNEL_CASES = tuple(CASES[i] for i in (1, 3, 4, 6))
"""Those for built-in kernels: every dtype and size, a window, sinks. Each shape and dtype is
compiled, up to a second on a user\'s device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks that an implementation serves.

    Args:
        implementation: a name, or an object as `choose` takes it.
    """
    name = getattr(implementation, "name", implementation)
    for case in KERNEL_CASES if name in ("cuda", "metal") else CASES:
        if choose(case.request(), implementation).name == name:
            yield _check(case, implementation)


def _check(case: Case, use: Any) -> Check:
    q, k, v, sinks = case.arrays()
    lengths, scale = mx.array(case.lengths), case.scale
    if use != "array":
        past = mx.arange(case.allocated)[:, None] >= lengths[:, None, None, None]
        k, v = (mx.where(past, mx.array(mx.nan, x.dtype), x) for x in (k, v))

    def found() -> list[mx.array]:
        return [
            attend(q, k, v, lengths, scale=scale, window=case.window, sinks=sinks, use=use).astype(
                mx.float32
            )
        ]

    def expected() -> list[mx.array]:
        with mx.stream(mx.cpu):
            return [
                reference.attend(q, k, v, lengths, scale=scale, window=case.window, sinks=sinks)
            ]

    rounds = use == "array" and on_cuda()
    return Check(str(case), found, expected, (max(ROUNDING[case.dtype], TF32 if rounds else 0.0),))
