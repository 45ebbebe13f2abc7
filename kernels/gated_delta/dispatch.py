"""Chooses which implementation serves a call, and says why.

On the CPU the array path is chosen: it is bit-equal to mlx-lm, which losslessness there rests on.
On a GPU the kernel of the backend is chosen; where it does not support a shape, the array path (or,
for long prompts, the chunked rule). An implementation can be named instead, which is how one is
switched off or compared.
"""

import difflib
import logging
from functools import lru_cache
from typing import Any, Protocol

import attrs
import mlx.core as mx

from . import array, chunked, cuda, metal
from .launch import Launcher, Request
from .tape import Tape

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Preference",
    "choose",
    "prefer",
    "prefill",
    "replay",
    "replay_verify",
    "verify",
]

IMPLEMENTATIONS = ("metal", "cuda", "array", "chunked")
_LONG = 64  # tokens from which, on a GPU without a kernel, the chunked rule beats the token loop
_log = logging.getLogger("draftloom.kernels")
_GPU = mx.Device(mx.gpu)


class _Supports(Protocol):
    def __call__(self, request: Request) -> str | None: ...


def _array_supports(request: Request) -> str | None:
    if request.value_heads % request.key_heads:
        return f"Hv = {request.value_heads} is not a multiple of Hk = {request.key_heads}"
    return None


_SUPPORTS: dict[str, _Supports] = {
    "metal": metal.supports,
    "cuda": cuda.supports,
    "array": _array_supports,
    "chunked": chunked.supports,
}


@attrs.frozen
class Choice:
    """What :func:`choose` decided.

    Attributes:
        name: one of :data:`IMPLEMENTATIONS`.
        reason: one sentence for people.
        rejected: for each implementation passed over, why.
        own: the implementation itself, where a third party's plugin has it.
    """

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    own: Any = None


@attrs.frozen
class Preference:
    """An implementation to take where it serves a request; elsewhere the array path runs.

    Attributes:
        implementation: one of :data:`IMPLEMENTATIONS`, or a third party's: an object with
            ``name``, ``supports(request)`` (None or why not) and the functions `verify`, `replay`,
            `replay_verify` and `prefill`, as here without ``use``. Those whose operation it
            refuses need not be there.
    """

    implementation: Any


def prefer(implementation: Any) -> Preference | None:
    """What ``use`` takes to prefer an implementation; None (no preference) stays None."""
    return None if implementation is None else Preference(implementation)


@lru_cache(maxsize=512)
def choose(request: Request, use: str | Preference | None = None) -> Choice:
    """The implementation that serves a request; the same request is decided, and logged, once.

    Args:
        request: what the call asks.
        use: the name of an implementation, a preference, or None to choose.

    Returns:
        The choice with its reasons.

    Raises:
        ValueError: if ``use`` is no implementation, or one that does not support the request.
    """
    if isinstance(use, Preference):
        return _preferred(request, use.implementation)
    if use is not None:
        return _named(request, use)
    rejected: list[tuple[str, str]] = []
    for name in ("metal", "cuda"):
        reason = _SUPPORTS[name](request)
        if reason is None:
            return _logged(request, Choice(name, "it supports this shape here", tuple(rejected)))
        rejected.append((name, reason))
    long = request.operation == "prefill" and request.tokens >= _LONG and not request.vector_gate
    if request.device == "gpu" and long:
        reason = f"no kernel serves this shape, and T >= {_LONG}"
        return _logged(request, Choice("chunked", reason, tuple(rejected)))
    if request.device == "cpu":
        reason = "on the CPU it equals mlx-lm bit for bit"
    else:
        reason = "no kernel serves this shape"
    return _logged(request, Choice("array", reason, tuple(rejected)))


def _named(request: Request, use: str) -> Choice:
    if use not in _SUPPORTS:
        near = difflib.get_close_matches(use, IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no implementation {use!r} of the gated delta rule; there are {IMPLEMENTATIONS}{hint}"
        )
    reason = _SUPPORTS[use](request)
    if reason is not None:
        raise ValueError(f"implementation {use!r} cannot serve {request.operation}: {reason}")
    return _logged(request, Choice(use, "it was asked for"))


def _preferred(request: Request, wanted: Any) -> Choice:
    if isinstance(wanted, str):
        name, own, supports = wanted, None, _SUPPORTS[wanted]
    else:
        name, own, supports = wanted.name, wanted, wanted.supports
    reason = supports(request)
    if reason is None:
        return _logged(request, Choice(name, "it was asked for", own=own))
    passed = ((name, reason),)
    return _logged(request, Choice("array", "what was asked for does not serve it", passed))


def _logged(request: Request, choice: Choice) -> Choice:
    passed = "; ".join(f"not {name}: {why}" for name, why in choice.rejected)
    _log.info(
        "gated delta %s: %s (%s)%s",
        request.operation,
        choice.name,
        choice.reason,
        passed and f" [{passed}]",
    )
    return choice


def _choose(
    operation: str, k: mx.array, value: mx.array, g: mx.array, dtype: mx.Dtype, use: Any
) -> Choice:
    """`choose` for these arrays; a look-up where such were seen before."""
    on_gpu = mx.default_device() == _GPU
    return _choose_for(operation, k.shape, value.shape, g.ndim == 4, dtype, on_gpu, use)


@lru_cache(maxsize=1024)
def _choose_for(
    operation: str,
    k: tuple[int, ...],
    value: tuple[int, ...],
    vector_gate: bool,
    dtype: mx.Dtype,
    on_gpu: bool,
    use: Any,
) -> Choice:
    request = Request(
        operation=operation,
        dtype=dtype,
        batch=value[0],
        tokens=value[1],
        key_heads=k[2],
        value_heads=value[2],
        key_size=k[3],
        value_size=value[3],
        device="gpu" if on_gpu else "cpu",
        vector_gate=vector_gate,
    )
    return choose(request, use)


def _check(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> None:
    _check_shapes(q.shape, k.shape, v.shape, g.shape, beta.shape, state.shape, state.dtype)


@lru_cache(maxsize=1024)
def _check_shapes(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    g: tuple[int, ...],
    beta: tuple[int, ...],
    state: tuple[int, ...],
    dtype: mx.Dtype,
) -> None:
    rows, tokens, heads, value_size = v
    expected = (rows, heads, value_size, k[3])
    if state != expected or dtype != mx.float32:
        raise ValueError(f"state is {dtype} {state}; float32 {expected} is needed")
    if q != k or k[:2] != (rows, tokens):
        raise ValueError(f"q {q} and k {k} do not fit v {v}")
    plain = (rows, tokens, heads)
    if g not in (plain, (*plain, k[3])) or beta != plain:
        raise ValueError(f"g {g} and beta {beta} must be {plain}")


def _launcher(name: str) -> Launcher:
    return metal.LAUNCHER if name == "metal" else cuda.LAUNCHER


def verify(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    *,
    write_state: bool = True,
    use: str | Preference | None = None,
) -> tuple[mx.array, Tape, mx.array | None]:
    """Run a block of T tokens and record its tape.

    Args:
        q: [B, T, Hk, Dk] queries, normalised and scaled.
        k: [B, T, Hk, Dk] normalised keys.
        v: [B, T, Hv, Dv] values; Hv is a multiple of Hk.
        g: [B, T, Hv] decays, 0..1; or [B, T, Hv, Dk], one a key channel (array code only).
        beta: [B, T, Hv] write strengths.
        state: [B, Hv, Dv, Dk] float32; not changed.
        mask: [B, T] bool, or None; a token with False changes no state, and its row of y means
            nothing.
        write_state: whether the state after the block is wanted.
        use: an implementation by name, a :class:`Preference`, or None to choose.

    Returns:
        y [B, T, Hv, Dv] in q's dtype, the tape, and the state after the block (None if not
        ``write_state``).

    Raises:
        ValueError: on shapes that do not fit, or an implementation that does not serve them.
    """
    _check(q, k, v, g, beta, state)
    choice = _choose("verify", k, v, g, v.dtype, use)
    name = choice.name
    if choice.own is not None:
        block: tuple[mx.array, Tape, mx.array | None] = choice.own.verify(
            q, k, v, g, beta, state, mask, write_state=write_state
        )
        return block
    if name in ("metal", "cuda"):
        return _launcher(name).verify(q, k, v, g, beta, state, mask, write_state=write_state)
    run = array.verify if name == "array" else chunked.verify
    y, tape, end = run(q, k, v, g, beta, state, mask)
    return y, tape, end if write_state else None


def replay(
    state: mx.array, tape: Tape, n: int | mx.array, *, use: str | Preference | None = None
) -> mx.array:
    """Bring a state forward by the first n entries of a tape.

    Equals, bit for bit, the state that :func:`verify` by the same implementation had after n
    tokens.

    Args:
        state: [B, Hv, Dv, Dk] float32, what the tape was recorded on; not changed.
        tape: T entries.
        n: 0..T, one number or [B] int32, or longer, as from :func:`..launch.row_counts` (array
            counts are not read, so not checked: kernels cut them to 0..T).
        use: an implementation by name, a :class:`Preference`, or None to choose.

    Returns:
        [B, Hv, Dv, Dk] float32.

    Raises:
        ValueError: if ``n`` is a number outside 0..T.
    """
    if isinstance(n, int) and not 0 <= n <= tape.length:
        raise ValueError(f"cannot replay {n} entries of a tape of {tape.length}")
    choice = _choose("replay", tape.k, tape.delta, tape.g, tape.k.dtype, use)
    if choice.own is not None:
        rebuilt: mx.array = choice.own.replay(state, tape, n)
        return rebuilt
    if choice.name in ("metal", "cuda"):
        return _launcher(choice.name).replay(state, tape, n)
    return array.replay(state, tape, n)


def prefill(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    *,
    use: str | Preference | None = None,
) -> tuple[mx.array, mx.array]:
    """Run T tokens without a tape; arguments and errors as :func:`verify`.

    Kernels have no gradient; ``use="chunked"`` has, and is the one for training.

    Returns:
        y [B, T, Hv, Dv] in q's dtype and the state after T tokens.
    """
    _check(q, k, v, g, beta, state)
    choice = _choose("prefill", k, v, g, v.dtype, use)
    if choice.own is not None:
        chunk: tuple[mx.array, mx.array] = choice.own.prefill(q, k, v, g, beta, state, mask)
        return chunk
    if choice.name in ("metal", "cuda"):
        return _launcher(choice.name).prefill(q, k, v, g, beta, state, mask)
    run = array.prefill if choice.name == "array" else chunked.prefill
    return run(q, k, v, g, beta, state, mask)


def replay_verify(
    previous: Tape,
    n: int | mx.array,
    block: tuple[mx.array, mx.array, mx.array, mx.array, mx.array],
    state: mx.array,
    mask: mx.array | None = None,
    *,
    write_state: bool = False,
    use: str | Preference | None = None,
) -> tuple[mx.array, Tape, mx.array, mx.array | None]:
    """Replay n entries of the last cycle's tape, then run this cycle's block.

    A kernel does both in one launch, reading the state once and writing it once.

    Args:
        previous: the tape recorded on ``state``.
        n: entries of it to keep, 0..T, one number or [B] int32 (see :func:`replay`).
        block: q, k, v, g, beta of this cycle, as in :func:`verify`.
        state: [B, Hv, Dv, Dk] float32, the state before ``previous``.
        mask: [B, T] bool of this cycle, or None.
        write_state: whether to write the state after the block too.
        use: an implementation by name, a :class:`Preference`, or None to choose.

    Returns:
        y, this cycle's tape, the state between (which the new tape was recorded on), and the state
        after or None.

    Raises:
        ValueError: as :func:`verify` and :func:`replay`.
    """
    _check(*block, state)
    if isinstance(n, int) and not 0 <= n <= previous.length:
        raise ValueError(f"cannot replay {n} entries of a tape of {previous.length}")
    choice = _choose("replay_verify", block[1], block[2], block[3], block[2].dtype, use)
    name = choice.name
    if choice.own is not None:
        found: tuple[mx.array, Tape, mx.array, mx.array | None] = choice.own.replay_verify(
            previous, n, block, state, mask, write_state=write_state
        )
        return found
    if name in ("metal", "cuda"):
        return _launcher(name).replay_verify(
            previous, n, block, state, mask, write_state=write_state
        )
    middle = array.replay(state, previous, n)
    y, tape, end = (array.verify if name == "array" else chunked.verify)(*block, middle, mask)
    return y, tape, middle, end if write_state else None
