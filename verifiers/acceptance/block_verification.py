"""Block verification: a draft is judged as a whole, not token by token. Lossless, and never keeps
fewer tokens on average than token-wise speculative sampling with the same draft.

With p_0 = 1, p_i = min(1, p_{i-1} p(d_i) / q(d_i)) is the share of the target's mass that the
first i draft tokens may claim. The prefix of length i < K is kept with chance
h_i = Z_i / (Z_i + 1 - p_i), where Z_i = sum_x max(p_i p(x) - q(x), 0) over the laws of the token
after it, and the whole draft with h_K = p_K. One number is drawn for each length, and the
*longest* prefix that passes is kept, also where a shorter one has failed. The next token follows
max(p_i p - q, 0), normalised; after the whole draft, p.

Source: Sun et al., "Block Verification Accelerates Speculative Decoding" (arXiv 2403.10444),
algorithm 2.
"""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import ComponentInfo, Draft, Preserves
from draftloom.sampling import SamplingState, law_of

from .speculative_sampling import at_tokens, draft_law_rows, draw_row

__all__ = ["BlockVerification", "keep_chances", "prefix_shares"]


class BlockVerification:
    """Rejection sampling of whole prefixes, for deterministic, dense and top-k drafts. For a draft
    of chosen tokens it is the same as token by token.

    Tokens that a drafter does not stand by (`Draft.lengths`) are judged like the others: they were
    drawn from their law, and the target has looked at them.
    """

    info = ComponentInfo(
        "block-verification",
        "rejection sampling of whole prefixes: keeps no fewer tokens than token by token",
        preserves=Preserves.DISTRIBUTION,
    )

    def accept(
        self, draft: Draft, logits: mx.array, sampling: SamplingState
    ) -> tuple[mx.array, mx.array]:
        """num_accepted [B] and next_token [B], from logits [B, K+1, V]."""
        p = law_of(logits, sampling.params)
        rows, width = draft.tokens.shape
        if not width:
            none = mx.zeros((rows,), dtype=mx.int32)
            return none, draw_row(p, none, sampling)
        q = draft_law_rows(draft, p.shape[-1])
        shares = prefix_shares(at_tokens(p, draft.tokens), at_tokens(q, draft.tokens))
        left = mx.maximum(shares[:, :width, None] * p[:, :width] - q, 0)
        chances = keep_chances(shares, left.sum(axis=-1))
        u = mx.random.uniform(shape=(rows, width), key=sampling.accept_key())
        # u in [0, 1): a chance of 1 is always kept, a chance of 0 (or NaN) never.
        lengths = mx.where(u < chances, mx.arange(1, width + 1), 0)
        num_accepted = lengths.max(axis=1).astype(mx.int32)
        # Without a residual p equals q up to rounding: nothing would have ended here.
        law = mx.where(left.sum(axis=-1, keepdims=True) > 0, left, p[:, :width])
        law = mx.concatenate([law, p[:, width:]], axis=1)
        return num_accepted, draw_row(law, num_accepted, sampling)


def prefix_shares(p_token: mx.array, q_token: mx.array) -> mx.array:
    """p_0 .. p_K [B, K+1], from what target and drafter gave each draft token [B, K]."""
    ratio = mx.where(q_token > 0, p_token / mx.maximum(q_token, 1e-30), 0)
    share = mx.ones_like(ratio[:, 0])
    shares = [share]
    for i in range(ratio.shape[1]):
        share = mx.minimum(1, share * ratio[:, i])
        shares.append(share)
    return mx.stack(shares, axis=1)


def keep_chances(shares: mx.array, left: mx.array) -> mx.array:
    """h_1 .. h_K [B, K].

    Args:
        shares: p_0 .. p_K [B, K+1].
        left: Z_0 .. Z_{K-1} [B, K].
    """
    inner, mass = shares[:, 1:-1], left[:, 1:]
    total = mass + 1 - inner
    # Nothing left and nothing missing: the laws are equal, and a longer prefix will be kept.
    chances = mx.where(total > 0, mass / mx.maximum(total, 1e-30), 0)
    return mx.concatenate([chances, shares[:, -1:]], axis=1)
