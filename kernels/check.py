"""A parity check: what an implementation gives, against what its reference gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import mlx.core as mx

__all__ = ["Check", "Outcome", "difference", "poison"]


@attrs.frozen
class Outcome:
    """How a check went.

    Attributes:
        error: the `difference` of the array that came nearest to its tolerance, or went past it.
        tolerance: the largest difference allowed for that array.
    """

    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every array was within its tolerance."""
        return self.error <= self.tolerance


@attrs.frozen(eq=False)
class Check:
    """One comparison, on the default device.

    Attributes:
        name: operation, shape and dtype, as ``verify bfloat16 B1 T16 Hk2 Hv4 128x128``.
        found: runs the implementation; gives arrays.
        expected: runs the reference; gives as many arrays, in the same order and shapes.
        tolerances: the largest `difference` allowed, one an array; 0 is bit-equal.
        same: checks with the same words here do the very same: a self-test runs one of them.
    """

    name: str
    found: Callable[[], Sequence[mx.array]]
    expected: Callable[[], Sequence[mx.array]]
    tolerances: tuple[float, ...]
    same: str = ""

    def run(self) -> Outcome:
        """Compare. Memory that the implementation may be given for its results is filled with NaN
        before, so that what it leaves out is seen.

        Raises:
            ValueError: other arrays, or other shapes, than the reference gives.
        """
        expected = list(self.expected())
        mx.eval(expected)
        poison(expected)
        found = list(self.found())
        mx.eval(found)
        if [a.shape for a in found] != [a.shape for a in expected]:
            raise ValueError(
                f"gives shapes {[a.shape for a in found]}, the reference "
                f"{[a.shape for a in expected]}"
            )
        outcomes = [
            Outcome(difference(a, b), tolerance)
            for a, b, tolerance in zip(found, expected, self.tolerances, strict=True)
        ]
        return max(outcomes, key=lambda outcome: (not outcome.passed, _share(outcome)))


def _share(outcome: Outcome) -> float:
    """Of the tolerance that is used up."""
    return outcome.error / outcome.tolerance if outcome.tolerance else outcome.error


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference of two arrays over the largest expected value; infinite where one is
    not finite. 0 only where they are equal in every element."""
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    if not a.size:
        return 0.0
    largest = mx.maximum(mx.max(mx.abs(b)), 1e-20)
    gap: Any = (mx.max(mx.abs(a - b)) / largest).item()
    return float(gap) if gap == gap else float("inf")


def poison(like: Sequence[mx.array]) -> None:
    """Fill the memory that arrays of these sizes will be given next with NaN."""
    for dtype in (mx.float32, mx.float16):
        mx.eval([mx.full(array.shape, mx.nan, dtype) for array in like])
