"""The gated delta rule a chunk of tokens at a time: matrix products instead of a token loop, and
differentiable.

Inside a chunk the innovations solve a unit lower triangular system; between chunks the state moves
on by one matrix product. It is another order of operations than mlx-lm's, so it has a tolerance
(below) and is chosen knowingly.

Numerics: the triangular matrix is inverted only in blocks of 16 rows, where doubling is exact after
four factors; blocks follow one another by substitution. Doubling over a whole chunk of 64 overflows
float32 when keys are correlated. Against the sequential rule: about 1e-6 on random keys, 2.5e-4 on
nearly parallel keys with beta near 1 (more where matrix products run in TF32, MLX-CUDA's default).
"""

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.check import Check

from .launch import Request
from .tape import Tape
from .targets import why_not_for

__all__ = ["BLOCK", "CHUNK", "by_default", "checks", "prefill", "supports", "verify", "why_not_for"]

BLOCK = 16
CHUNK = 64


def by_default() -> bool:
    """Whether `auto` takes the chunked rule here: on a GPU, for prompts without a kernel."""
    return bool(mx.default_device() != mx.Device(mx.cpu))


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("chunked")


def supports(request: Request) -> str | None:
    """None if the chunked rule can serve the request, else the reason why not."""
    if request.operation == "replay":
        return "the chunked rule has no replay of its own: use the array path's"
    if request.vector_gate:
        return "a decay for every key channel: the chunked rule takes one a head"
    if request.value_heads % request.key_heads:
        return f"Hv = {request.value_heads} is not a multiple of Hk = {request.key_heads}"
    return None


def verify(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[mx.array, Tape, mx.array]:
    """Run T tokens and record the tape; arguments, shapes and returns as :func:`..array.verify`.

    Args:
        q: [B, T, Hk, Dk].
        k: [B, T, Hk, Dk].
        v: [B, T, Hv, Dv].
        g: [B, T, Hv]; a decay of exactly 0 is taken as 1e-30.
        beta: [B, T, Hv].
        state: [B, Hv, Dv, Dk] float32.
        mask: [B, T] bool or None; y is zero where it is False.
        chunk: tokens in a chunk, a multiple of 16.

    Raises:
        ValueError: if ``chunk`` is not a positive multiple of 16.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.3 (the WY form with decays).
    """
    if chunk <= 0 or chunk % BLOCK:
        raise ValueError(f"chunk = {chunk}: a positive multiple of {BLOCK} is needed")
    tokens, heads, key_heads = v.shape[1], v.shape[2], k.shape[2]
    chunk = min(chunk, -(-tokens // BLOCK) * BLOCK)
    kept_g, kept_k = g, k
    if mask is not None:
        kept_g = mx.where(mask[:, :, None], g, mx.array(1, g.dtype))
        kept_k = mx.where(mask[:, :, None, None], k, mx.array(0, k.dtype))
        q, v = (mx.where(mask[:, :, None, None], x, mx.array(0, x.dtype)) for x in (q, v))
        beta = mx.where(mask[:, :, None], beta, mx.array(0, beta.dtype))
    fold = [_fold(x, chunk) for x in (q, kept_k, v)]
    log_g = mx.log(mx.maximum(kept_g.astype(mx.float32), 1e-30))
    decay, strength = (_fold(x[..., None], chunk)[..., 0] for x in (log_g, beta))
    queries, keys = (mx.repeat(x, heads // key_heads, axis=1) for x in fold[:2])
    y, delta, state = _chunks(queries, keys, fold[2], mx.cumsum(decay, axis=-1), strength, state)
    y, delta = (_unfold(x, tokens) for x in (y, delta))
    return y.astype(q.dtype), Tape(delta=delta, k=kept_k, g=kept_g), state


def prefill(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Run T tokens without a tape; as :func:`verify`. Returns y and the state after T tokens."""
    y, _, state = verify(q, k, v, g, beta, state, mask, chunk=chunk)
    return y, state


def _fold(x: mx.array, chunk: int) -> mx.array:
    """[B, T, H, D] -> [B, H, chunks, chunk, D] float32, padded with zeros at the end."""
    rows, tokens, heads, size = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -tokens % chunk), (0, 0), (0, 0)])
    return x.reshape(rows, -1, chunk, heads, size).transpose(0, 3, 1, 2, 4)


def _unfold(x: mx.array, tokens: int) -> mx.array:
    """[B, H, chunks, chunk, D] -> [B, T, H, D]."""
    rows, heads, _, _, size = x.shape
    return x.reshape(rows, heads, -1, size)[:, :, :tokens].transpose(0, 2, 1, 3)


def _chunks(
    q: mx.array, k: mx.array, v: mx.array, c: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """All chunks of [B, H, chunks, C, D]; c is the running sum of log decays within a chunk [B, H,
    chunks, C].
    """
    size = c.shape[-1]
    lower = mx.tril(mx.ones((size, size), dtype=mx.bool_))
    # The mask goes inside the exponential: above the diagonal it would overflow, and spoil the
    # gradient.
    gaps = mx.exp(mx.where(lower, c[..., :, None] - c[..., None, :], -mx.inf))
    keys_t = k.swapaxes(-1, -2)
    coupling = -mx.tril(beta[..., None] * (k @ keys_t) * gaps, -1)
    grown = mx.exp(c)[..., None]
    solved = _solve(
        coupling, mx.concatenate([beta[..., None] * v, beta[..., None] * grown * k], axis=-1)
    )
    u, w = mx.split(solved, [v.shape[-1]], axis=-1)
    attention = (q @ keys_t) * gaps
    q_grown = q * grown
    k_left = (k * mx.exp(c[..., -1:] - c)[..., None]).swapaxes(-1, -2)
    last = mx.exp(c[..., -1])[..., None, None]
    state = state.swapaxes(-1, -2)
    outputs, deltas = [], []
    for i in range(c.shape[2]):
        delta = u[:, :, i] - w[:, :, i] @ state
        outputs.append(q_grown[:, :, i] @ state + attention[:, :, i] @ delta)
        deltas.append(delta)
        state = last[:, :, i] * state + k_left[:, :, i] @ delta
    return mx.stack(outputs, axis=2), mx.stack(deltas, axis=2), state.swapaxes(-1, -2)


def _solve(coupling: mx.array, right: mx.array) -> mx.array:
    """X with (I - N) X = right, for strictly lower N [..., C, C], in blocks of 16 rows."""
    blocks = coupling.shape[-1] // BLOCK
    diagonal = mx.stack(
        [
            coupling[..., i * BLOCK : (i + 1) * BLOCK, i * BLOCK : (i + 1) * BLOCK]
            for i in range(blocks)
        ],
        axis=-3,
    )
    inverse, power = mx.eye(BLOCK) + diagonal, diagonal
    for _ in range(3):
        power = power @ power
        inverse = inverse + power @ inverse
    done: list[mx.array] = []
    for i in range(blocks):
        rows = slice(i * BLOCK, (i + 1) * BLOCK)
        part = right[..., rows, :]
        if done:
            part = part + coupling[..., rows, : i * BLOCK] @ mx.concatenate(done, axis=-2)
        done.append(inverse[..., i, :, :] @ part)
    return mx.concatenate(done, axis=-2)
