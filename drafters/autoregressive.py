"""Autoregressive drafting: any smaller model of mlx-lm with the same vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.abilities import BindContext
from draftloom.contracts import (
    ComponentInfo,
    Draft,
    DraftLaw,
    DraftRequest,
    Speculation,
    TargetAdapter,
    TargetInfo,
)
from draftloom.errors import ModelError, Problem
from draftloom.memory import CacheCost, cache_bytes, cache_costs, module_bytes
from draftloom.model_info import ModelInfo
from draftloom.sampling import SamplingState, log_probs, target_law

__all__ = ["AutoregressiveDrafter"]

PREFILL_CHUNK = 2048


class AutoregressiveDrafter:
    """A small model proposes token by token; its own caches are rolled back like a target's.

    At temperature 0 it proposes its most likely tokens; above, it draws from its law under the
    request's filters, which is the q that the acceptance policy gets.

    Args:
        model: folder of the draft model.

    Raises:
        ModelError: the folder has no readable config.
    """

    info = ComponentInfo(
        "autoregressive",
        "a smaller model of the same vocabulary, token by token",
        law=DraftLaw.DENSE,
        default_width=4,
        model_options=("model",),
        paired=("autoregressive",),
    )

    def __init__(self, model: Path | TargetAdapter) -> None:
        self._path = model if isinstance(model, Path) else None
        self._model: TargetAdapter | None = None if isinstance(model, Path) else model
        self._open_speculation: Callable[[list[Any], mx.array], Speculation] | None = None
        self._costs: tuple[CacheCost, ...] = ()

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """The vocabularies must be one."""
        if self._path is None:
            found: Any = self._model.info.vocab_size if self._model is not None else None
        else:
            config = ModelInfo.from_path(self._path).text_config
            found = config.get("vocab_size")
        if found is not None and found != target.vocab_size:
            message = f"the draft model has {found} tokens, the target {target.vocab_size}"
            yield Problem("autoregressive", message, "use a draft model of the same family")

    def bind(self, context: BindContext) -> None:
        """Load the draft model."""
        if self._path is not None:
            self._model = context.open_model(self._path)
        if self._model is None:
            raise ModelError("the autoregressive drafter has no model")
        self._open_speculation = context.open_rollback(self._model)
        if isinstance(self._model.model, nn.Module):
            self._costs, _ = cache_costs(self._model.forward, self._model.make_cache(), None)

    def memory(self) -> dict[str, int]:
        """Bytes of the draft model's weights; nothing before it is loaded."""
        return {} if self._model is None else {"weights": module_bytes(self._model.model)}

    def context_bytes(self, tokens: int) -> int:
        """Bytes of the draft model's caches; 0 before it is loaded."""
        return sum(cost.at(tokens) for cost in self._costs)

    def open(self, request: DraftRequest) -> AutoregressiveSession:
        """Begin a generation.

        Raises:
            ModelError: the drafter was not bound.
        """
        if self._model is None or self._open_speculation is None:
            raise ModelError("the autoregressive drafter has no model", "build the pipeline first")
        return AutoregressiveSession(self._model, self._open_speculation)


class AutoregressiveSession:
    """The draft model's caches.

    Between proposals they hold the first `_cached` committed tokens; `_pending` are those that
    were committed since. A proposal runs the pending tokens, then the anchor and its own tokens
    under a speculation, which the next `observe` cuts to what was kept. B = 1.
    """

    def __init__(
        self,
        model: TargetAdapter,
        open_speculation: Callable[[list[Any], mx.array], Speculation],
    ) -> None:
        self._model = model
        self._open_speculation = open_speculation
        self._cache = model.make_cache()
        self._pending: list[int] = []
        self._speculation: Speculation | None = None
        self._run = 0

    def observe(self, committed: Sequence[Sequence[int]], features: mx.array | None) -> None:
        """Keep what was proposed and committed; the rest waits for the next proposal."""
        (tokens,) = committed
        kept = 0
        if self._speculation is not None:
            # The committed tokens are the anchor and accepted drafts: those that were run are kept.
            kept = min(len(tokens), self._run)
            self._speculation.commit((kept - 1,))
            self._speculation = None
        self._pending.extend(tokens[kept:])

    def memory(self) -> dict[str, int]:
        """Bytes of the draft model's caches."""
        return {"context": sum(map(cache_bytes, self._cache))}

    def propose(self, anchor: mx.array, width: int, sampling: SamplingState) -> Draft:
        """Up to `width` tokens after the anchor [1]; above temperature 0 with their q rows."""
        self._catch_up()
        # The block's ids are drawn as it runs: until then only its length is known.
        self._speculation = self._open_speculation(self._cache, mx.zeros((1, width), mx.int32))
        self._run = width
        tokens, laws, token = [], [], anchor[:, None]
        for _ in range(width):
            logits = self._model.forward(token, self._speculation.cache).logits[:, -1]
            if sampling.params.greedy:
                token = mx.argmax(log_probs(logits), axis=-1)[:, None]
            else:
                law = target_law(logits, sampling.params)
                laws.append(law)
                drawn = mx.random.categorical(mx.log(law), axis=-1, key=sampling.draft_key())
                token = drawn[:, None]
            tokens.append(token)
        proposed = mx.concatenate(tokens, axis=1).astype(mx.int32)
        self._speculation.block = mx.concatenate([anchor[:, None], proposed[:, :-1]], axis=1)
        healthy = mx.isfinite(logits).any(axis=-1)
        below = logits.shape[-1]
        draft = Draft.deterministic(proposed, healthy, source="autoregressive", ids_below=below)
        if not laws:
            return draft
        return attrs.evolve(draft, law=DraftLaw.DENSE, probs=mx.stack(laws, axis=1))

    def _catch_up(self) -> None:
        if self._speculation is not None:  # proposed, and nothing came of it
            self._speculation.abort()
            self._speculation = None
        for start in range(0, len(self._pending), PREFILL_CHUNK):
            chunk = mx.array([self._pending[start : start + PREFILL_CHUNK]], dtype=mx.int32)
            self._model.forward(chunk, self._cache)
            mx.async_eval([entry.state for entry in self._cache])
        self._pending.clear()
