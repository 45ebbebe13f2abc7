"""Which targets have use for it."""

from __future__ import annotations

from draftloom.contracts import CacheKind, TargetInfo

__all__ = ["why_not_for"]


def why_not_for(target: TargetInfo) -> str | None:
    """Why a target has no use for verify attention; None where it may have."""
    if CacheKind.ATTENTION in target.cache_kinds:
        return None
    return f"{target.model_type} has no plain key/value caches"
