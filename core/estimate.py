"""What a pipeline will take, before its weights are loaded and once they are."""

from __future__ import annotations

from typing import Any

import attrs
import mlx.nn as nn

from draftloom.blueprint import Blueprint
from draftloom.contracts import TargetAdapter
from draftloom.guard import Costs, check_weights
from draftloom.memory import KeepsContext, Sketches, WorkShape, cache_costs
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager

__all__ = ["MemoryEstimate", "costs_of", "estimate", "weights_fit"]


@attrs.frozen
class MemoryEstimate:
    """What a pipeline will take, in bytes. None is not known.

    Attributes:
        context_length: tokens that caches are counted for; 0 counts none.
        target_weights, drafter_weights: of the models once loaded.
        caches: of the target at that length.
        drafter_context: of the drafter at that length.
        prefill: what one chunk of the prompt needs to work, at that length.
        limit: bytes that the process may hold.
    """

    context_length: int
    target_weights: int | None
    drafter_weights: int | None
    caches: int | None
    drafter_context: int
    prefill: int | None
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes of all that is known."""
        parts = (self.target_weights, self.drafter_weights, self.caches, self.prefill)
        return self.drafter_context + sum(part or 0 for part in parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the unit."""
        return {"unit": "bytes", **attrs.asdict(self), "total": self.total}


def estimate(plugins: PluginManager, plan: Blueprint) -> MemoryEstimate:
    """What a checked pipeline will take. Loads no weight."""
    settings, model = plan.spec.memory, plan.model
    length = settings.context_length or 0
    weights = plugins.estimate_weights(model, plan.spec.dtype)
    drafter = 0
    known = True
    for folder in plan.folders:
        found = plugins.estimate_weights(
            ModelInfo.from_path(folder), plan.spec.dtype if weights is None else _name(weights)
        )
        known = known and found is not None
        drafter += 0 if found is None else found.size
    caches = prefill = None
    if length and weights is not None and isinstance(plan.adapter, Sketches):
        costs, itemsize = cache_costs(
            *plan.adapter.sketch(model, weights.dtype), plan.spec.kv_cache
        )
        work = _work(plan, itemsize)
        caches = sum(cost.at(length) for cost in costs)
        prefill = work.at(min(settings.prefill_step_size, length), length)
    context = 0
    if isinstance(plan.drafter, KeepsContext):
        context = plan.drafter.context_bytes(length)
    return MemoryEstimate(
        context_length=length,
        target_weights=None if weights is None else weights.size,
        drafter_weights=drafter if known else None,
        caches=caches,
        drafter_context=context,
        prefill=prefill,
        limit=settings.limit,
    )


def _name(weights: Any) -> str:
    return str(weights.dtype).removeprefix("mlx.core.")


def weights_fit(plugins: PluginManager, plan: Blueprint) -> bool:
    """Whether the drafter fits beside the target.

    Raises:
        MemoryLimitError: not even the target does.
    """
    limit = plan.spec.memory.limit
    if limit is None:
        return True
    found = estimate(plugins, plan)
    drafter = (found.drafter_weights or 0) + found.drafter_context
    return check_weights(found.target_weights or 0, drafter, found.caches or 0, limit)


def costs_of(plan: Blueprint, target: TargetAdapter) -> Costs | None:
    """What a generation of a loaded pipeline needs, by length; None where that is not known."""
    if not isinstance(target.model, nn.Module):
        return None
    try:
        caches, itemsize = cache_costs(target.forward, target.make_cache(), plan.spec.kv_cache)
    except Exception:  # noqa: BLE001 a target that cannot run: the generation says why
        return None
    drafter = plan.drafter
    context = drafter.context_bytes if isinstance(drafter, KeepsContext) else lambda tokens: 0
    return Costs(caches, _work(plan, itemsize), context)


def _work(plan: Blueprint, itemsize: int) -> WorkShape:
    features = len(plan.drafter.info.tap_layers) * plan.target.hidden_size
    packed = plan.spec.kv_cache is not None
    return WorkShape.of(plan.model, plan.target.hidden_size, features, itemsize, packed)
