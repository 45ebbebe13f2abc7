"""Mamba-2's rule, written to be read: float32, one token after the other.

What :mod:`.array` and mlx-lm's own block form are measured against. Shapes as in :mod:`.array`.
"""

import mlx.core as mx

__all__ = ["run"]


def run(
    x: mx.array,
    keys: mx.array,
    queries: mx.array,
    steps: mx.array,
    rate: mx.array,
    skip: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """Run T tokens in float32: ``S <- exp(step rate) S + step x b^T``, ``y = S c + skip x``.

    Args:
        x: [B, T, H, Dh] inputs.
        keys, queries: [B, T, G, Ds], mlx-lm's ``B`` and ``C``.
        steps: [B, T, H] time steps, positive.
        rate: [H], negative.
        skip: [H], mlx-lm's ``D``.
        state: [B, H, Dh, Ds].

    Returns:
        y [B, T, H, Dh], and the states after 0..T tokens [B, T + 1, H, Dh, Ds].

    Source: Mamba-2 (arXiv 2405.21060), equation 2.
    """
    repeats = x.shape[2] // keys.shape[2]
    keys, queries = (mx.repeat(v.astype(mx.float32), repeats, axis=2) for v in (keys, queries))
    outputs, states = [], [state.astype(mx.float32)]
    for t in range(x.shape[1]):
        decay = mx.exp(steps[:, t] * rate)[..., None, None]
        written = (steps[:, t, :, None] * x[:, t])[..., None] * keys[:, t, :, None, :]
        states.append(decay * states[-1] + written)
        read = (states[-1] * queries[:, t, :, None, :]).sum(axis=-1)
        outputs.append(read + skip[:, None] * x[:, t])
    return mx.stack(outputs, axis=1), mx.stack(states, axis=1)
