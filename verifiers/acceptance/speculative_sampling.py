"""Token-wise speculative sampling: the output follows the target's law whatever the drafter does.

Position i is accepted with probability min(1, p(x) / q(x)). At the first rejection the next token
is drawn from the residual max(p - q, 0), normalised; after K acceptances, from p itself. p is the
target's law under the same filters and temperature as without a drafter.

Source: Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, DraftLaw, Preserves
from draftloom.sampling import SamplingState, law_of

__all__ = ["SpeculativeSampling", "at_tokens", "draft_law_rows", "draw_row", "residual"]


class SpeculativeSampling:
    """Rejection sampling token by token, for deterministic, dense and top-k drafts."""

    info = ComponentInfo(
        "speculative-sampling",
        "rejection sampling, position by position",
        preserves=Preserves.DISTRIBUTION,
    )

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        p = law_of(logits, sampling.params)
        q = draft_law_rows(draft, p.shape[-1])
        if draft.lengths is not None:  # where the draft ends, nothing is rejected: p is drawn from
            q = mx.where(draft.stands()[..., None], q, 0)
        rows, width = draft.tokens.shape
        if width:
            p_token, q_token = at_tokens(p, draft.tokens), at_tokens(q, draft.tokens)
            u = mx.random.uniform(shape=(rows, width), key=sampling.accept_key())
            # u in [0, 1): u * q < p accepts always where p >= q > 0 and never where p = 0.
            accepted = (u * q_token < p_token) & draft.stands()
            num_accepted = mx.cumprod(accepted.astype(mx.int32), axis=1).sum(axis=1)
        else:
            num_accepted = mx.zeros((rows,), dtype=mx.int32)
        return num_accepted, draw_row(residual(p, q), num_accepted, sampling)


def draft_law_rows(draft: Draft, vocab_size: int) -> mx.array:
    """q of a draft as dense rows [B, K, V] float32, whatever its law."""
    if draft.law is DraftLaw.DENSE and draft.probs is not None:
        return draft.probs.astype(mx.float32)
    if draft.law is DraftLaw.TOP_K and draft.probs is not None and draft.candidates is not None:
        rows = mx.zeros((*draft.tokens.shape, vocab_size), dtype=mx.float32)
        return mx.put_along_axis(rows, draft.candidates, draft.probs.astype(mx.float32), axis=-1)
    return (mx.arange(vocab_size) == draft.tokens[..., None]).astype(mx.float32)


def residual(p: mx.array, q: mx.array) -> mx.array:
    """What the next token is drawn from, if the draft ends at row i: [B, K+1, V], not normalised.

    Args:
        p: [B, K+1, V] float32.
        q: [B, K, V] float32.

    Returns:
        max(p - q, 0) for the first K rows and p for the last. A row without a residual (p = q up
        to rounding, where nothing is ever rejected) is p.
    """
    width = q.shape[1]
    left = mx.maximum(p[:, :width] - q, 0)
    left = mx.where(left.sum(axis=-1, keepdims=True) > 0, left, p[:, :width])
    return mx.concatenate([left, p[:, width:]], axis=1)


def at_tokens(rows: mx.array, tokens: mx.array) -> mx.array:
    """What the first K rows say of the tokens: [B, K] of [B, K or more, V] and [B, K]."""
    verified = rows[:, : tokens.shape[1]]
    return mx.take_along_axis(verified, tokens[..., None], axis=-1)[..., 0]


def draw_row(rows: mx.array, index: mx.array, sampling: SamplingState) -> mx.array:
    """A token [B] int32 drawn from row index[b] of [B, K+1, V], which need not be normalised."""
    row = mx.take_along_axis(rows, index[:, None, None], axis=1)[:, 0]
    drawn = mx.random.categorical(mx.log(row), axis=-1, key=sampling.accept_key())
    return drawn.astype(mx.int32)
