"""What the engine is given: a built pipeline, and one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import mlx.core as mx

from draftloom.contracts import (
    AcceptancePolicy,
    CycleNode,
    Drafter,
    Speculation,
    TargetAdapter,
    Verifier,
    WidthPolicy,
)
from draftloom.graph import Graph
from draftloom.guard import Costs
from draftloom.kv_cache import KVQuantization
from draftloom.memory import MemorySettings
from draftloom.mismatch import MismatchMonitor
from draftloom.sampling import SamplingParams

__all__ = ["EngineParts", "EngineRequest"]


@attrs.frozen(eq=False)
class EngineParts:
    """A built pipeline, as the engine sees it.

    Attributes:
        graph: the checked graph.
        target: the loaded target.
        drafter, verifier, acceptance, width: the components.
        open_speculation: the rollback over all caches: (cache, block) -> Speculation.
        nodes: the inserted nodes by node name.
        hook: pluggy's relay, for the observing hooks.
        kv_quantization: how key/value caches are packed; None leaves them plain.
        monitor: listens whether drafter and target belong together, over all generations.
        memory: the limit, and prompt tokens run at once.
        costs: what a generation will need; None where that is not known.
    """

    graph: Graph
    target: TargetAdapter
    drafter: Drafter
    verifier: Verifier
    acceptance: AcceptancePolicy
    width: WidthPolicy
    open_speculation: Callable[[list[Any], mx.array], Speculation]
    nodes: Mapping[str, CycleNode]
    hook: Any
    monitor: MismatchMonitor
    kv_quantization: KVQuantization | None = None
    memory: MemorySettings = attrs.Factory(MemorySettings)
    costs: Callable[[], Costs | None] = lambda: None


@attrs.frozen(eq=False)
class EngineRequest:
    """One generation.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: tokens to generate, at least one; None is up to the context limit.
        sampling: parameters.
        eos_token_ids: tokens that end the text.
        prefill_chunk: prompt tokens run at once; None is what the pipeline says.
        cache: caches to go on with (they hold what came before the prompt); None makes new ones.
        cancelled: polled once a cycle; True ends the text there.
        on_prefill: told (tokens done, tokens of the prompt) after every chunk.
        logprobs: give each token's log-probability, and this many of the most likely tokens;
            None gives none.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    prefill_chunk: int | None = None
    cache: list[Any] | None = None
    cancelled: Callable[[], bool] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    logprobs: int | None = None
