"""Parity checks of an implementation of the gated delta rule, on the default device.

Tolerances (largest difference over the largest value): y is rounded to the dtype of q, so that it
differs by a rounding of that dtype; innovations and states are float32 in every case. The chunked
rule's matrix products run in TF32 on CUDA. Replay must give the very bits of the state that the
same implementation's verify had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import mlx.core as mx

from draftloom.device import on_cuda
from draftloom.kernels.check import Check

from . import reference
from .dispatch import choose, prefer, prefill, replay, replay_verify, verify
from .launch import Request

__all__ = ["CASES", "KERNEL_CASES", "Case", "checks_of"]

ROUNDING = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}
"""Of y, by the dtype of q."""
STATE, TF32 = 1e-5, 2e-2
"""Of innovations and states: in float32; where products are rounded to TF32."""


Block = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]
"""q, k, v, g, beta."""


@attrs.frozen
class Case:
    """A shape to check.

    Attributes:
        dtype: of q, k and v.
        rows, tokens, key_heads: B, T, Hk.
        sharing: Hv / Hk.
        sizes: Dk, Dv.
        masked: whether a mask with holes that differ by row is given.
    """

    dtype: mx.Dtype
    rows: int
    tokens: int
    key_heads: int
    sharing: int
    sizes: tuple[int, int]
    masked: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).rpartition(".")[2]
        heads = f"Hk{self.key_heads} Hv{self.key_heads * self.sharing}"
        shape = f"B{self.rows} T{self.tokens} {heads} {self.sizes[0]}x{self.sizes[1]}"
        return f"{kind} {shape}{' masked' if self.masked else ''}"

    def arrays(self) -> tuple[Block, mx.array, mx.array | None]:
        """q, k, v, g, beta; the state; the mask or None."""
        keys = iter(mx.random.split(mx.random.key(7), 6))
        (dk, dv), heads = self.sizes, self.key_heads * self.sharing
        shape = (self.rows, self.tokens)

        def unit() -> mx.array:
            x = mx.random.normal((*shape, self.key_heads, dk), key=next(keys))
            return x / mx.sqrt((x * x).sum(axis=-1, keepdims=True))

        q, k = unit() * dk**-0.5, unit()
        v = mx.random.normal((*shape, heads, dv), key=next(keys))
        g = mx.random.uniform(0.7, 1.0, (*shape, heads), key=next(keys))
        beta = mx.random.uniform(0.0, 1.0, (*shape, heads), key=next(keys)).astype(self.dtype)
        state = mx.random.normal((self.rows, heads, dv, dk), key=next(keys))
        mask = None
        if self.masked:
            token, row = mx.arange(self.tokens)[None], mx.arange(self.rows)[:, None]
            mask = (3 * token + row) % 4 != 0
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        return (q, k, v, g, beta), state, mask

    def request(self, operation: str) -> Request:
        """What a call with this case asks."""
        device = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
        heads = self.key_heads * self.sharing
        shape = (self.rows, self.tokens, self.key_heads, heads, *self.sizes)
        return Request(operation, self.dtype, *shape, device)


CASES = (
    Case(mx.float32, 2, 5, 2, 2, (32, 64)),
    Case(mx.float32, 3, 16, 1, 1, (64, 32), masked=True),
    Case(mx.float32, 1, 33, 2, 4, (96, 32)),
    Case(mx.bfloat16, 1, 1, 2, 2, (128, 128)),
    Case(mx.bfloat16, 2, 16, 2, 2, (128, 128)),
    Case(mx.bfloat16, 3, 7, 1, 4, (32, 32), masked=True),
    Case(mx.float16, 2, 63, 2, 1, (64, 64)),
    Case(mx.float16, 1, 4, 1, 2, (256, 64), masked=True),
)
KERNEL_CASES = tuple(CASES[i] for i in (0, 3, 4, 7))
"""Those for built-in kernels: every dtype, a mask, both geometries. Each shape and dtype is
compiled, up to a second on a user\'s device; the tests run the others."""


def checks_of(implementation: Any) -> Iterator[Check]:
    """All checks that an implementation serves.

    Args:
        implementation: a name, or an object as `Preference` takes it.
    """
    use, name = prefer(implementation), getattr(implementation, "name", implementation)
    state_tolerance = TF32 if name == "chunked" and on_cuda() else STATE
    makers: dict[str, Callable[..., Check]] = {
        "verify": _verify,
        "prefill": _prefill,
        "replay": _replay,
        "replay_verify": _replay_verify,
    }
    for operation, make in makers.items():
        for case in KERNEL_CASES if name in ("cuda", "metal") else CASES:
            if choose(case.request(operation), use).name == name:
                label = f"{operation} {case}"
                yield make(case, use, label, state_tolerance)


def _shown(y: mx.array, mask: mx.array | None) -> mx.array:
    """y with masked rows zeroed: they mean nothing."""
    y = y.astype(mx.float32)
    return y if mask is None else mx.where(mask[:, :, None, None], y, 0.0)


def _verify(case: Case, use: Any, label: str, state_tolerance: float) -> Check:
    block, state, mask = case.arrays()

    def found() -> list[mx.array]:
        y, tape, end = verify(*block, state, mask, use=use)
        assert end is not None
        return [_shown(y, mask), tape.delta, end]

    def expected() -> list[mx.array]:
        truth = reference.run(*block, state, mask)
        return [truth.y, truth.tape.delta, truth.states[:, -1]]

    of_y = max(state_tolerance, ROUNDING[case.dtype])
    return Check(label, found, expected, (of_y, state_tolerance, state_tolerance))


def _prefill(case: Case, use: Any, label: str, state_tolerance: float) -> Check:
    block, state, mask = case.arrays()

    def found() -> list[mx.array]:
        y, end = prefill(*block, state, mask, use=use)
        return [_shown(y, mask), end]

    def expected() -> list[mx.array]:
        truth = reference.run(*block, state, mask)
        return [truth.y, truth.states[:, -1]]

    of_y = max(state_tolerance, ROUNDING[case.dtype])
    return Check(label, found, expected, (of_y, state_tolerance))


def _counts(case: Case) -> mx.array:
    """A count for every row: all, none, a part."""
    return mx.array([(case.tokens, 0, case.tokens // 2)[row % 3] for row in range(case.rows)])


def _replay(case: Case, use: Any, label: str, state_tolerance: float) -> Check:
    """Row by row to another count, and, where the implementation verifies too, the very bits of
    its own state there."""
    block, state, mask = case.arrays()
    counts: list[int] = _counts(case).tolist()  # type: ignore[assignment]
    exact = choose(case.request("verify"), use).name == choose(case.request("replay"), use).name

    def found() -> list[mx.array]:
        _, tape, _ = verify(*block, state, mask, use=use if exact else "array")
        return [replay(state, tape, _counts(case), use=use)]

    def expected() -> list[mx.array]:
        if not exact:
            states = reference.run(*block, state, mask).states
            return [mx.stack([states[row, n] for row, n in enumerate(counts)])]
        ends = [_after(block, state, mask, place, use) for place in enumerate(counts)]
        return [mx.concatenate(ends)]

    name = f"{label}{', bits of verify' if exact else ''}"
    return Check(name, found, expected, (0.0 if exact else state_tolerance,))


def _after(
    block: Block, state: mx.array, mask: mx.array | None, place: tuple[int, int], use: Any
) -> mx.array:
    """The state of one row after n tokens, by verify."""
    row, n = place
    if not n:
        return state[row : row + 1]
    q, k, v, g, beta = (mx.contiguous(x[row : row + 1, :n]) for x in block)
    shown = None if mask is None else mx.contiguous(mask[row : row + 1, :n])
    end = verify(q, k, v, g, beta, mx.contiguous(state[row : row + 1]), shown, use=use)[2]
    assert end is not None
    return end


def _replay_verify(case: Case, use: Any, label: str, state_tolerance: float) -> Check:
    block, state, mask = case.arrays()
    counts: list[int] = _counts(case).tolist()  # type: ignore[assignment]
    q, k, v, g, beta = block
    later = (q, k, v[:, ::-1], g, beta)  # another block on the same keys
    run = partial(reference.run, *block, state)

    def found() -> list[mx.array]:
        tape = run().tape
        tape = attrs.evolve(tape, k=tape.k.astype(case.dtype))
        y, after, middle, end = replay_verify(
            tape, _counts(case), later, state, mask, write_state=True, use=use
        )
        assert end is not None
        return [_shown(y, mask), after.delta, middle, end]

    def expected() -> list[mx.array]:
        states = run().states
        middle = mx.stack([states[row, n] for row, n in enumerate(counts)])
        truth = reference.run(*later, middle, mask)
        return [truth.y, truth.tape.delta, middle, truth.states[:, -1]]

    of_y = max(state_tolerance, ROUNDING[case.dtype])
    return Check(label, found, expected, (of_y, *[state_tolerance] * 3))
