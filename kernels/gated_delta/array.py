"""The gated delta rule in array code, token by token, in mlx-lm's own order of operations.

This is the version that runs where no kernel does. Every operation and its order are those of
mlx-lm's ``gated_delta_ops`` (0.32.2), so that on the CPU outputs and states equal mlx-lm's bit for
bit, and so does a state rebuilt by :func:`replay`. The faster chunked order, with a tolerance, is
in :mod:`draftloom.kernels.gated_delta.chunked`.

Shapes, here and in the other modules of this package: B rows, T tokens, Hk key heads, Hv value
heads (a multiple of Hk), Dk and Dv the sizes of a key and of a value. ``q`` is already scaled,
``q`` and ``k`` normalised, ``g`` already exponentiated.
"""

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.check import Check

from .tape import Tape
from .targets import why_not_for

__all__ = ["STOCK", "by_default", "checks", "prefill", "replay", "verify", "why_not_for"]

STOCK = True


def by_default() -> bool:
    """Whether `auto` takes array code here: on a GPU, for what no kernel serves."""
    return True


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("array")


def _decay(state: mx.array, g: mx.array) -> mx.array:
    """Of a head [B, Hv], or of each of its key channels [B, Hv, Dk]."""
    return state * (g[..., None, None] if g.ndim == 2 else g[..., None, :])


def _write(state: mx.array, k: mx.array, delta: mx.array) -> mx.array:
    return state + k[..., None, :] * delta[..., None]


def _spread(x: mx.array, value_heads: int) -> mx.array:
    """[B, T, Hk, D] -> [B, T, Hv, D], each key head repeated for the value heads that share it."""
    repeats = value_heads // x.shape[2]
    return mx.repeat(x, repeats, -2) if repeats > 1 else x


def _keep(mask: mx.array, new: mx.array, old: mx.array) -> mx.array:
    return mx.where(mx.expand_dims(mask, axis=(1, 2, 3)), new, old)


def verify(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, Tape, mx.array]:
    """Run T tokens and record the tape.

    Args:
        q: [B, T, Hk, Dk] scaled, normalised queries.
        k: [B, T, Hk, Dk] normalised keys.
        v: [B, T, Hv, Dv] values.
        g: [B, T, Hv] decays, or [B, T, Hv, Dk] with one for each key channel (Kimi Linear).
        beta: [B, T, Hv] write strengths.
        state: [B, Hv, Dv, Dk] float32, left as it is.
        mask: [B, T] bool or None; a token with False leaves the state alone, and its row of y means
            nothing.

    Returns:
        y [B, T, Hv, Dv] in q's dtype, the tape, and the state after all T tokens.

    Source: Gated Delta Networks (arXiv 2412.06464), equation 10; order of operations as in mlx-lm.
    """
    heads = v.shape[2]
    q_heads, k_heads = _spread(q, heads), _spread(k, heads)
    outputs, deltas = [], []
    for t in range(v.shape[1]):
        key = k_heads[:, t]
        new = _decay(state, g[:, t])
        memory = (new * key[..., None, :]).sum(axis=-1)
        delta = (v[:, t] - memory) * beta[:, t][..., None]
        new = _write(new, key, delta)
        outputs.append((new * q_heads[:, t][..., None, :]).sum(axis=-1).astype(q.dtype))
        deltas.append(delta)
        state = new if mask is None else _keep(mask[:, t], new, state)
    delta = mx.stack(deltas, axis=1).astype(mx.float32)
    if mask is not None:
        delta = mx.where(mask[:, :, None, None], delta, 0.0)
        g = mx.where(mask.reshape(*mask.shape, *[1] * (g.ndim - 2)), g, mx.array(1, g.dtype))
        k = mx.where(mask[:, :, None, None], k, mx.array(0, k.dtype))
    return mx.stack(outputs, axis=1), Tape(delta=delta, k=k, g=g), state


def replay(state: mx.array, tape: Tape, n: int | mx.array) -> mx.array:
    """Bring a state forward by the first n entries of a tape.

    Bit-equal on the CPU to the state that :func:`verify` had after n tokens.

    Args:
        state: [B, Hv, Dv, Dk] float32, the state the tape was recorded on.
        tape: T entries.
        n: how many entries, 0..T: one number, or [B] int32 with one for each row
            (or longer: see :func:`..launch.row_counts`).

    Returns:
        [B, Hv, Dv, Dk] float32.

    Raises:
        ValueError: if ``n`` is a number outside 0..T (counts in an array are not read, and so not
            checked).
    """
    counts = n[: state.shape[0]] if isinstance(n, mx.array) else None
    if isinstance(n, int) and not 0 <= n <= tape.length:
        raise ValueError(f"cannot replay {n} entries of a tape of {tape.length}")
    keys = _spread(tape.k, tape.delta.shape[2])
    for t in range(n if isinstance(n, int) else tape.length):
        new = _write(_decay(state, tape.g[:, t]), keys[:, t], tape.delta[:, t])
        state = new if counts is None else _keep(counts > t, new, state)
    return state


def prefill(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run T tokens without a tape: arguments and order as :func:`verify`. Returns y and the state
    after T tokens.
    """
    y, _, state = verify(q, k, v, g, beta, state, mask)
    return y, state
