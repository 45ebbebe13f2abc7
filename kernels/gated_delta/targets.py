"""Which targets run the gated delta rule."""

from draftloom.contracts import CacheKind, TargetInfo

__all__ = ["why_not_for"]


def why_not_for(target: TargetInfo) -> str | None:
    """Why a target has no use for the operation; None where it has."""
    if CacheKind.GATED_DELTA in target.cache_kinds or target.model_type == "kimi_linear":
        return None
    return f"{target.model_type} has no gated-delta layers"
