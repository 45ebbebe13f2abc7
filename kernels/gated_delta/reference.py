"""The gated delta rule, written to be read: float32, one token after the other, nothing clever.

What every other module of this package is measured against. Shapes as in :mod:`.array`.
"""

import attrs
import mlx.core as mx

from .tape import Tape

__all__ = ["Run", "replay", "run"]


@attrs.frozen(eq=False)
class Run:
    """What a run of T tokens gives.

    Attributes:
        y: [B, T, Hv, Dv] float32 outputs; zero where the mask is False.
        tape: innovations, keys and decays, all float32.
        states: [B, T + 1, Hv, Dv, Dk] float32; entry n is the state after n tokens.
    """

    y: mx.array
    tape: Tape
    states: mx.array


def run(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> Run:
    """Run T tokens in float32.

    For each head, with S [Dv, Dk]: S <- g S; delta = beta (v - S k); S <- S + delta k^T; y = S q.

    Args:
        q: [B, T, Hk, Dk].
        k: [B, T, Hk, Dk].
        v: [B, T, Hv, Dv].
        g: [B, T, Hv].
        beta: [B, T, Hv].
        state: [B, Hv, Dv, Dk].
        mask: [B, T] bool or None.

    Returns:
        Outputs, tape and every state on the way.

    Source: Gated Delta Networks (arXiv 2412.06464), equation 10.
    """
    q, k, v, g, beta, state = (x.astype(mx.float32) for x in (q, k, v, g, beta, state))
    sharing = v.shape[2] // k.shape[2]
    queries, keys = mx.repeat(q, sharing, axis=2), mx.repeat(k, sharing, axis=2)
    if mask is None:
        mask = mx.ones(v.shape[:2], dtype=mx.bool_)
    outputs, deltas, states = [], [], [state]
    for t in range(v.shape[1]):
        kept = mask[:, t, None, None]
        decayed = g[:, t, :, None, None] * state
        delta = beta[:, t, :, None] * (v[:, t] - _times(decayed, keys[:, t]))
        delta = mx.where(kept, delta, 0.0)
        written = decayed + delta[:, :, :, None] * keys[:, t, :, None, :]
        state = mx.where(kept[..., None], written, state)
        outputs.append(mx.where(kept, _times(state, queries[:, t]), 0.0))
        deltas.append(delta)
        states.append(state)
    tape = Tape(
        delta=mx.stack(deltas, axis=1),
        k=mx.where(mask[:, :, None, None], k, 0.0),
        g=mx.where(mask[:, :, None], g, 1.0),
    )
    return Run(y=mx.stack(outputs, axis=1), tape=tape, states=mx.stack(states, axis=1))


def replay(state: mx.array, tape: Tape, n: int) -> mx.array:
    """The state [B, Hv, Dv, Dk] after the first n entries of a tape, in float32."""
    keys = mx.repeat(tape.k.astype(mx.float32), tape.delta.shape[2] // tape.k.shape[2], axis=2)
    for t in range(n):
        decayed = tape.g[:, t, :, None, None].astype(mx.float32) * state
        state = decayed + tape.delta[:, t, :, :, None] * keys[:, t, :, None, :]
    return state


def _times(matrix: mx.array, vector: mx.array) -> mx.array:
    """[..., Dv, Dk] times [..., Dk], summed without a matrix product (which some GPUs round to
    TF32).
    """
    return (matrix * vector[..., None, :]).sum(axis=-1)
