"""Mamba-2's rule in array code, in the order of operations of mlx-lm's one-token step.

On the CPU a state rebuilt by :func:`replay` equals, bit for bit, the one that mlx-lm reaches token
by token (``ssm_attn`` with one token). Over several tokens at once mlx-lm adds in another order.

Shapes: B rows, T tokens, H heads of size Dh, G groups of keys of size Ds (G divides H).
"""

import mlx.core as mx
from mlx_lm.models.ssm import compute_dt

from .tape import SsmTape

__all__ = ["replay", "tape_of"]


def tape_of(
    x: mx.array,
    keys: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    a_log: mx.array,
    limit: tuple[float, float],
) -> SsmTape:
    """What a block does to the state.

    Args:
        x: [B, T, H, Dh] inputs.
        keys: [B, T, G, Ds], mlx-lm's ``B``.
        dt: [B, T, H] time steps as projected.
        dt_bias: [H].
        a_log: [H], log of minus the rate.
        limit: smallest and largest time step.

    Source: Mamba-2 (arXiv 2405.21060), equation 2; order of operations as in mlx-lm.
    """
    step = compute_dt(dt, dt_bias, limit)
    rate = -mx.exp(a_log).astype(step.dtype)
    decay = mx.exp(step * rate.reshape(1, 1, -1))
    return SsmTape(decay=decay, inputs=step[..., None] * x, keys=keys)


def replay(state: mx.array, tape: SsmTape, n: int | mx.array) -> mx.array:
    """Bring a state forward by the first n entries of a tape.

    Args:
        state: [B, H, Dh, Ds], the state the tape was recorded on; left as it is.
        tape: T entries.
        n: how many, 0..T: one number, or [B] int32 (or longer) with one for each row.

    Returns:
        [B, H, Dh, Ds] float32.

    Raises:
        ValueError: if ``n`` is a number outside 0..T.
    """
    if isinstance(n, int) and not 0 <= n <= tape.length:
        raise ValueError(f"cannot replay {n} entries of a tape of {tape.length}")
    if not isinstance(n, int):
        n = n[: state.shape[0]]
    repeats = tape.inputs.shape[2] // tape.keys.shape[2]
    keys = mx.repeat(tape.keys, repeats, axis=2)
    for t in range(n if isinstance(n, int) else tape.length):
        written = tape.inputs[:, t, :, :, None] * keys[:, t, :, None, :]
        new = written + tape.decay[:, t, :, None, None] * state
        if not isinstance(n, int):
            new = mx.where((n > t)[:, None, None, None], new, state)
        state = new
    return state
