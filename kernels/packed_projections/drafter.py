"""Implementations of ``packed-drafter``."""

from .plan import PLANS

__all__ = ["attention", "context", "measure", "mlp", "packed"]

_plans = PLANS["packed-drafter"]
packed, measure = _plans["packed"], _plans["measure"]
attention, context, mlp = _plans["attention"], _plans["context"], _plans["mlp"]
