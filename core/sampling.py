"""Sampling parameters, the filtered law of the target, and the random streams of a generation."""

from __future__ import annotations

import math
import secrets

import attrs
import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from draftloom.errors import UsageError

__all__ = ["SamplingParams", "SamplingState", "log_probs", "target_law"]


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}")
    return float(value)


@attrs.frozen
class SamplingParams:
    """How the next token is drawn; the meaning of every field is mlx-lm's.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it after the filters.
        top_p: keep the smallest set of tokens with this mass, 0 < top_p <= 1; 1 is off.
        top_k: keep the k most likely; 0 is off.
        min_p: drop tokens below this share of the most likely one, 0 <= min_p <= 1; 0 is off.
        seed: reproduces the output on one machine; None draws one.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __attrs_post_init__(self) -> None:
        if _number("temperature", self.temperature) < 0:
            raise UsageError(
                f"temperature must be 0 or more, got {self.temperature}", "0 is greedy decoding"
            )
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}", "1 turns it off")
        if not 0 <= _number("min_p", self.min_p) <= 1:
            raise UsageError(f"min_p must be in [0, 1], got {self.min_p}", "0 turns it off")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise UsageError(f"top_k must be a whole number >= 0, got {self.top_k}", "0 is off")
        if self.seed is not None and not isinstance(self.seed, int):
            raise UsageError(f"seed must be a whole number, got {self.seed!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a top_k that the vocabulary cannot serve (mlx-lm refuses it too).

        Raises:
            UsageError: top_k is not below vocab_size.
        """
        if self.top_k >= vocab_size:
            raise UsageError(
                f"top_k {self.top_k} is not below the vocabulary size {vocab_size}", "0 is off"
            )


class SamplingState:
    """Parameters and two independent random streams of one generation.

    Draft draws and acceptance draws never share a stream: with a shared one the output would not
    follow the target's law.

    Attributes:
        params: the parameters.
        seed: the seed in use, drawn if the parameters have none.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._draft, self._accept = mx.random.split(mx.random.key(self.seed & (2**64 - 1)))

    def draft_key(self) -> mx.array:
        """A fresh key [2] uint32 of the drafter's stream."""
        self._draft, key = mx.random.split(self._draft)
        return key

    def accept_key(self) -> mx.array:
        """A fresh key [2] uint32 of the acceptance policy's stream."""
        self._accept, key = mx.random.split(self._accept)
        return key


def log_probs(logits: mx.array) -> mx.array:
    """Log-probabilities [..., V] in the logits' type, in mlx-lm's own order of operations.

    mlx-lm takes the argmax of these, not of the logits: rounding of the difference can make two
    tokens equal, so that the same subtraction is needed to take the same token.
    """
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def target_law(logits: mx.array, params: SamplingParams) -> mx.array:
    """The law that mlx-lm's sampler draws from: filters first, then the temperature.

    Args:
        logits: [..., V].
        params: temperature above 0.

    Returns:
        Probabilities [..., V] float32.

    Source: mlx_lm.sample_utils.make_sampler (top_p, min_p, top_k, then logits / temperature).
    """
    kept = log_probs(logits)
    if params.top_p < 1:
        kept = apply_top_p(kept, params.top_p)
    if params.min_p > 0:
        kept = apply_min_p(kept, params.min_p)
    if params.top_k > 0:
        kept = apply_top_k(kept, params.top_k)
    scaled = kept * (1.0 / params.temperature)
    return mx.softmax(scaled.astype(mx.float32), axis=-1)
