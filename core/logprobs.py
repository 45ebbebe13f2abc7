"""Log-probabilities of emitted tokens: computed on the device, read in the cycle's one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from draftloom.errors import UsageError
from draftloom.events import TokenLogprob
from draftloom.sampling import log_probs

__all__ = ["LogprobReader"]


class LogprobReader:
    """Scores the tokens of a cycle by the rows they were decided on.

    A log-probability is mlx-lm's: of the target, after bias, penalties and processors, before
    temperature and filters.

    Args:
        top: most likely tokens to give for each position, 0 for none.
        vocab_size: V.

    Raises:
        UsageError: more than there are, or not a number.
    """

    def __init__(self, top: int, vocab_size: int) -> None:
        if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top < vocab_size:
            raise UsageError(
                f"top_logprobs must be in 0..{vocab_size - 1}, got {top}",
                "0 gives the emitted token's alone",
            )
        self._top = top

    def lazy(
        self, logits: mx.array, draft: mx.array, num_accepted: mx.array, next_token: mx.array
    ) -> list[mx.array]:
        """What `records` wants to be evaluated.

        Args:
            logits: [1, K+1, V].
            draft: [1, K] int32.
            num_accepted, next_token: [1] int32.
        """
        places = mx.arange(logits.shape[1])[None]
        padded = mx.concatenate([draft, next_token[:, None].astype(draft.dtype)], axis=1)
        tokens = mx.where(places == num_accepted[:, None], next_token[:, None], padded)
        scores = log_probs(logits)
        chosen = mx.take_along_axis(scores, tokens[..., None], axis=-1)[0, :, 0]
        found = [chosen.astype(mx.float32)]
        if self._top:
            best = mx.argpartition(-scores, kth=self._top - 1, axis=-1)[..., : self._top]
            values = mx.take_along_axis(scores, best, axis=-1)
            found += [best[0], values[0].astype(mx.float32)]
        return found

    def records(self, evaluated: list[mx.array], tokens: Sequence[int]) -> tuple[TokenLogprob, ...]:
        """One record a token, from the evaluated arrays; the most likely tokens first. A token
        that was forbidden is not among them."""
        chosen, *best = [_rows(array) for array in evaluated]
        found = []
        for i, token in enumerate(tokens):
            pairs = zip(best[0][i], best[1][i], strict=True) if best else ()
            top = [pair for pair in pairs if pair[1] > -math.inf]
            top.sort(key=lambda pair: (-pair[1], pair[0]))
            found.append(TokenLogprob(token, chosen[i], tuple(top)))
        return tuple(found)


def _rows(array: mx.array) -> Any:
    return array.tolist()
