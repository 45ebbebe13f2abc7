"""Sampling parameters, the filtered law of the target, and the random streams of a generation."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from draftloom.errors import UsageError

__all__ = [
    "LogitsProcessor",
    "SamplingParams",
    "SamplingState",
    "law_of",
    "log_probs",
    "target_law",
    "xtc_cut",
]

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""As in mlx-lm: (tokens [n] int32 so far, logits [1, V]) -> logits [1, V]."""


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value!r}", "write it as 0.5")
    return float(value)


def _whole(name: str, value: object, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{name} must be a whole number >= 0, got {value}", hint)


def _token(name: str, value: Any) -> int:
    """A token id, also as text: the keys of a TOML table are text."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{name} names token {value!r}", "a token id is a whole number >= 0")
    return int(value)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """A mapping from token id to bias as sorted pairs."""
    try:
        pairs = list(value.items()) if isinstance(value, Mapping) else [(k, v) for k, v in value]
    except (TypeError, ValueError):
        raise UsageError(
            f"logit_bias must map token ids to numbers, got {value!r}", "as {42: -5.0}"
        ) from None
    found: dict[int, float] = {}
    for key, number in pairs:
        token = _token("logit_bias", key)
        if token in found:
            raise UsageError(f"logit_bias names token {token} twice", "give one number a token")
        if number != -math.inf:  # which forbids the token
            _number(f"logit_bias of token {token}", number)
        found[token] = float(number)
    return tuple(sorted(found.items()))


def _tokens(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"xtc_special_tokens must be a list of token ids, got {value!r}")
    return tuple(_token("xtc_special_tokens", token) for token in value)


def _processors(value: Any) -> tuple[LogitsProcessor, ...]:
    several = isinstance(value, Iterable) and not callable(value)
    found = tuple(value) if several else () if value is None else (value,)
    for processor in found:
        if not callable(processor):
            raise UsageError(
                f"a logits processor must be callable, got {processor!r}",
                "a function of (tokens, logits) that returns logits",
            )
    return found


@attrs.frozen
class SamplingParams:
    """How the next token is drawn; the meaning of every field is mlx-lm's.

    The fields are applied in the order of mlx-lm: logit bias, repetition, presence and frequency
    penalty, processors of the user's own; then, above temperature 0, top-p, min-p, XTC, top-k, and
    the temperature last. A context size counts the last tokens of prompt and text; 0 is all.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it after the filters.
        top_p: keep the smallest set of tokens with this mass, 0 < top_p <= 1; 1 is off.
        top_k: keep the k most likely; 0 is off.
        min_p: drop tokens below this share of the most likely one, 0 <= min_p <= 1; 0 is off.
        seed: reproduces the output on one machine; None draws one.
        xtc_probability: chance that XTC drops the top choices of a token, 0..1; 0 is off.
        xtc_threshold: of the tokens above this probability only the least likely stays, 0..0.5.
        xtc_special_tokens: token ids that XTC never drops; None is newline and end-of-sequence.
        repetition_penalty: positive logits of tokens in the context are divided by it, negative
            ones multiplied; 1 (or 0, as in mlx-lm) is off.
        repetition_context_size: tokens it looks back.
        presence_penalty: subtracted once from logits of tokens in the context; 0 is off.
        presence_context_size: tokens it looks back.
        frequency_penalty: subtracted for each time a token is in the context; 0 is off.
        frequency_context_size: tokens it looks back.
        logit_bias: added to the logits of these token ids; ``-inf`` forbids one.
        logits_processors: functions of the user's own, `LogitsProcessor`, called once a verified
            position. What one returns has to depend on its arguments only.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] | None = attrs.field(default=None, converter=_tokens)
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: tuple[tuple[int, float], ...] = attrs.field(default=(), converter=_bias)
    logits_processors: tuple[LogitsProcessor, ...] = attrs.field(default=(), converter=_processors)

    def __attrs_post_init__(self) -> None:
        if _number("temperature", self.temperature) < 0:
            raise UsageError(
                f"temperature must be 0 or more, got {self.temperature}", "0 is greedy decoding"
            )
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {self.top_p}", "1 turns it off")
        if not 0 <= _number("min_p", self.min_p) <= 1:
            raise UsageError(f"min_p must be in [0, 1], got {self.min_p}", "0 turns it off")
        _whole("top_k", self.top_k, "0 is off")
        if self.seed is not None and not isinstance(self.seed, int):
            raise UsageError(f"seed must be a whole number, got {self.seed!r}")
        self._check_xtc()
        if _number("repetition_penalty", self.repetition_penalty) < 0:
            raise UsageError(
                f"repetition_penalty must be 0 or more, got {self.repetition_penalty}", "1 is off"
            )
        for name in ("presence", "frequency"):
            _number(f"{name}_penalty", getattr(self, f"{name}_penalty"))
        for name in ("repetition", "presence", "frequency"):
            size = f"{name}_context_size"
            _whole(size, getattr(self, size), "0 looks back to the start of the prompt")

    def _check_xtc(self) -> None:
        if not 0 <= _number("xtc_probability", self.xtc_probability) <= 1:
            raise UsageError(
                f"xtc_probability must be in [0, 1], got {self.xtc_probability}", "0 turns it off"
            )
        if not 0 <= _number("xtc_threshold", self.xtc_threshold) <= 0.5:
            raise UsageError(
                f"xtc_threshold must be in [0, 0.5], got {self.xtc_threshold}",
                "above 0.5 no two tokens can be",
            )
        if self.xtc_probability > 0 and self.greedy:
            raise UsageError(
                "xtc_probability needs a temperature above 0",
                "greedy decoding always takes the top choice, which XTC drops",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed before a token is chosen: bias, penalties, processors."""
        return bool(self.logit_bias or self.logits_processors or any(self.penalties().values()))

    def penalties(self) -> dict[str, float]:
        """The penalties in mlx-lm's order and by its names; 0 where one is off."""
        repetition = self.repetition_penalty
        return {
            "repetition_penalty": 0.0 if repetition == 1 else repetition,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse what the vocabulary cannot serve.

        Raises:
            UsageError: top_k is not below vocab_size (mlx-lm refuses it too), or a token id of the
                bias or of the special tokens is outside.
        """
        if self.top_k >= vocab_size:
            raise UsageError(
                f"top_k {self.top_k} is not below the vocabulary size {vocab_size}", "0 is off"
            )
        named = {
            "logit_bias": [token for token, _ in self.logit_bias],
            "xtc_special_tokens": self.xtc_special_tokens or (),
        }
        for name, tokens in named.items():
            outside = [token for token in tokens if token >= vocab_size]
            if outside:
                raise UsageError(
                    f"{name} names token {outside[0]}, the vocabulary has {vocab_size}",
                    "ids are those of the target's tokenizer",
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

    def mark(self) -> object:
        """Where both streams are, for `rewind`."""
        return self._draft, self._accept

    def rewind(self, mark: object) -> None:
        """Go back to a mark: the keys given since will be given again."""
        self._draft, self._accept = mark  # type: ignore[misc]


def log_probs(logits: mx.array) -> mx.array:
    """Log-probabilities [..., V] in the logits' type, in mlx-lm's own order of operations.

    mlx-lm takes the argmax of these, not of the logits: rounding of the difference can make two
    tokens equal, so that the same subtraction is needed to take the same token.
    """
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def law_of(logits: mx.array, params: SamplingParams) -> mx.array:
    """The law [..., V] float32 of a token at any temperature: one-hot at 0, else `target_law`."""
    if not params.greedy:
        return target_law(logits, params)
    best = mx.argmax(log_probs(logits), axis=-1, keepdims=True)
    return (mx.arange(logits.shape[-1]) == best).astype(mx.float32)


def target_law(logits: mx.array, params: SamplingParams) -> mx.array:
    """The law that mlx-lm's sampler draws from: filters first, then the temperature.

    XTC throws a coin a token: with `xtc_probability` the top choices are dropped. The law of the
    token, coin included, is the mixture of the cut law and the plain one, and that is what is
    returned: speculative sampling from the mixture follows it exactly, with no coin to share.

    Args:
        logits: [..., V], after bias, penalties and processors.
        params: temperature above 0.

    Returns:
        Probabilities [..., V] float32.

    Source: mlx_lm.sample_utils.make_sampler (top_p, min_p, xtc, top_k, then logits / temperature).
    """
    kept = log_probs(logits)
    if params.top_p < 1:
        kept = apply_top_p(kept, params.top_p)
    if params.min_p > 0:
        kept = apply_min_p(kept, params.min_p)
    plain = _tempered(kept, params)
    chance = params.xtc_probability
    if chance <= 0:
        return plain
    cut = _tempered(xtc_cut(kept, params.xtc_threshold, params.xtc_special_tokens or ()), params)
    return chance * cut + (1 - chance) * plain


def _tempered(kept: mx.array, params: SamplingParams) -> mx.array:
    if params.top_k > 0:
        kept = apply_top_k(kept, params.top_k)
    scaled = kept * (1.0 / params.temperature)
    return mx.softmax(scaled.astype(mx.float32), axis=-1)


def xtc_cut(kept: mx.array, threshold: float, special: tuple[int, ...]) -> mx.array:
    """Log-probabilities [..., V] without the top choices: of the tokens above the threshold only
    the least likely stays, and every special token.

    Source: mlx_lm.sample_utils.apply_xtc, the branch that its coin chooses.
    """
    probs = mx.softmax(kept, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    dropped = probs > least
    if special:
        dropped[..., mx.array(special)] = False
    return mx.where(dropped, -mx.inf, kept)
