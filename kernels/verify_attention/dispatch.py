"""Chooses which implementation serves a call, and says why.

A kernel is chosen by itself only where it has been timed and won: on the backends of `TIMED`, for
the head sizes of `TIMED_SIZES`. Elsewhere the array path (MLX's own attention) runs unless a kernel
is asked for by name.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.device import on_gpu

from . import array, cuda, metal
from .launch import TIMED, TIMED_SIZES, Request

__all__ = ["IMPLEMENTATIONS", "TIMED", "Choice", "attend", "choose"]

IMPLEMENTATIONS = ("metal", "cuda", "array")
_log = logging.getLogger("draftloom.kernels")
_MODULES: dict[str, Any] = {"metal": metal, "cuda": cuda, "array": array}


@attrs.frozen
class Choice:
    """What :func:`choose` decided.

    Attributes:
        name: one of :data:`IMPLEMENTATIONS`, or a third party's.
        reason: one sentence for people.
        rejected: for each implementation passed over, why.
        run: the function that serves, as :func:`attend` without ``use``.
    """

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    run: Callable[..., mx.array] = attrs.field(repr=False, eq=False)


@lru_cache(maxsize=512)
def choose(request: Request, use: Any = None) -> Choice:
    """The implementation that serves a request; the same request is decided, and logged, once.

    Args:
        request: what the call asks.
        use: None to choose; the name of an implementation to take where it serves the request; or
            one of a third party: an object with ``name``, ``supports(request)`` (None or why not)
            and ``attend``. Where what was asked for does not serve it, the array path runs.

    Returns:
        The choice with its reasons.

    Raises:
        ValueError: if ``use`` is a name that no implementation has.
    """
    if request.heads % request.key_heads:
        raise ValueError(f"Hq = {request.heads} is not a multiple of Hkv = {request.key_heads}")
    if use is not None:
        return _logged(_wanted(request, use))
    rejected: list[tuple[str, str]] = []
    for name in ("metal", "cuda"):
        reason = _MODULES[name].supports(request)
        if reason is None and (name not in TIMED or request.size not in TIMED_SIZES):
            reason = f"it has not been timed so; --kernel verify-attention={name} takes it"
        if reason is None:
            return _logged(_made(name, "it supports this shape here", tuple(rejected)))
        rejected.append((name, reason))
    return _logged(_made("array", "MLX's own attention", tuple(rejected)))


def _made(name: str, reason: str, rejected: tuple[tuple[str, str], ...] = ()) -> Choice:
    return Choice(name, reason, rejected, _MODULES[name].attend)


def _wanted(request: Request, use: Any) -> Choice:
    if isinstance(use, str) and use not in _MODULES:
        near = difflib.get_close_matches(use, IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"no implementation {use!r} of verify attention; there are {IMPLEMENTATIONS}{hint}"
        )
    own = _MODULES[use] if isinstance(use, str) else use
    name = use if isinstance(use, str) else use.name
    reason = own.supports(request)
    if reason is None:
        return Choice(name, "it was asked for", (), own.attend)
    return _made("array", "what was asked for does not serve it", ((name, reason),))


def _logged(choice: Choice) -> Choice:
    passed = "; ".join(f"not {name}: {why}" for name, why in choice.rejected)
    _log.info("verify attention: %s (%s)%s", choice.name, choice.reason, passed and f" [{passed}]")
    return choice


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    lengths: int | mx.array,
    *,
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    use: Any = None,
) -> mx.array:
    """Attention of the last M tokens over a cache of keys and values at its allocated length.

    Args:
        q: [B, Hq, M, D] queries, rotated.
        keys: [B, Hkv, N, D]; the buffer of a cache. What lies past a length is not looked at.
        values: [B, Hkv, N, D].
        lengths: valid keys, the M of the block among them: one number, or [B] int32 (or longer).
            A change of it compiles nothing and plans nothing.
        scale: factor on the scores.
        window: keys a query sees at most, itself among them; or None.
        sinks: [Hq] one logit more a head, which takes weight and gives nothing; or None.
        use: see :func:`choose`.

    Returns:
        [B, Hq, M, D] in q's dtype; a query that sees no key gives zeros in the kernels.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    rows, heads, queries, size = q.shape
    if keys.shape != values.shape or (keys.shape[0], keys.shape[3]) != (rows, size):
        raise ValueError(f"keys {keys.shape} and values {values.shape} do not fit q {q.shape}")
    if isinstance(lengths, int) and not queries <= lengths <= keys.shape[2]:
        raise ValueError(f"{lengths} valid keys; {queries} to {keys.shape[2]} are possible")
    gpu = on_gpu()
    same = q.dtype == keys.dtype == values.dtype
    request = Request(
        dtype=q.dtype,
        batch=rows,
        queries=queries,
        heads=heads,
        key_heads=keys.shape[1],
        size=size,
        device="gpu" if gpu else "cpu",
        window=window,
        sinks=sinks is not None,
    )
    choice = choose(request, use if same else "array")
    return choice.run(q, keys, values, lengths, scale=scale, window=window, sinks=sinks)
