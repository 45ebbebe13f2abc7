"""The built-in cache rollbacks."""

from __future__ import annotations

from draftloom.contracts import CacheKind, ComponentInfo, TargetInfo
from draftloom.hookspecs import Register, hookimpl

__all__ = ["register_cache_rollbacks", "register_kernels", "resolve_cache_rollback"]


@hookimpl
def register_cache_rollbacks(register: Register) -> None:
    """trim, tape-replay, sliding-window, snapshot."""
    register("trim", "draftloom.caches.trim:TrimRollback")
    register("tape-replay", "draftloom.caches.tape_replay:TapeReplayRollback")
    register("sliding-window", "draftloom.caches.sliding_window:SlidingWindowRollback")
    register("snapshot", "draftloom.caches.snapshot:SnapshotRollback")


@hookimpl
def register_kernels(register: Register) -> None:
    """How verify sees a key/value cache."""
    name = "fixed-length-caches/allocated"
    summary = "key/value caches at their allocated length, with a mask; off: the valid rows"
    register(name, "draftloom.caches.fixed_length", ComponentInfo(name, summary))


@hookimpl(trylast=True)
def resolve_cache_rollback(cache_kind: CacheKind, target: TargetInfo) -> str | None:
    """Trim for attention, replay where a tape is recorded, a strategy of its own for a sliding
    window, snapshot for the rest."""
    if cache_kind == CacheKind.ATTENTION:
        return "trim"
    if cache_kind == CacheKind.SLIDING_WINDOW:
        return "sliding-window"
    if cache_kind in target.tape_kinds:
        return "tape-replay"
    return "snapshot"
