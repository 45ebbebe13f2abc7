"""Implementations of ``packed-projections``."""

from .plan import PLANS

__all__ = ["attention", "gated_delta", "measure", "mlp", "packed"]

_plans = PLANS["packed-projections"]
packed, measure = _plans["packed"], _plans["measure"]
attention, gated_delta, mlp = _plans["attention"], _plans["gated-delta"], _plans["mlp"]
