"""A checked pipeline whose weights are not loaded yet, and what its parts are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from draftloom.contracts import (
    AcceptancePolicy,
    CacheKind,
    CacheRollback,
    CycleNode,
    Drafter,
    TargetInfo,
    Verifier,
    WidthPolicy,
)
from draftloom.graph import Graph
from draftloom.kernel_settings import KernelSettings
from draftloom.model_info import ModelInfo
from draftloom.sampling import SamplingParams
from draftloom.spec import PipelineSpec

__all__ = ["Blueprint", "names_of", "rollback_name", "width_name"]


@attrs.frozen(eq=False)
class Blueprint:
    """A checked pipeline whose weights are not loaded yet.

    Attributes:
        spec: with every ``auto`` resolved.
        graph: the checked cycle.
        model: the target's config.
        target: what the target is.
        adapter, drafter, verifier, acceptance, width, rollbacks, nodes: the components made
            (adapter: its class; rollbacks: by cache kind; nodes: by node name).
        names: names of target, adapter, drafter, verifier, acceptance, rollback, width.
        folders: model folders that the drafter's options name; their weights may not be here yet.
        sampling: default sampling parameters.
        kernels: which implementation each kernel operation runs, as components get it.
    """

    spec: PipelineSpec
    graph: Graph
    model: ModelInfo
    target: TargetInfo
    adapter: Any
    drafter: Drafter
    verifier: Verifier
    acceptance: AcceptancePolicy
    width: WidthPolicy
    rollbacks: Mapping[CacheKind, CacheRollback]
    nodes: Mapping[str, CycleNode]
    names: dict[str, str]
    sampling: SamplingParams
    folders: tuple[Path, ...] = ()
    kernels: KernelSettings = attrs.Factory(KernelSettings)


def rollback_name(rollbacks: Mapping[CacheKind, CacheRollback]) -> str:
    """Of all strategies together."""
    return " + ".join(sorted({r.info.name for r in rollbacks.values()})) or "none"


def width_name(width: WidthPolicy) -> str:
    """Of a policy, with its number where it has a fixed one."""
    tokens = getattr(width, "tokens", None)
    return width.info.name if tokens is None else f"{width.info.name} {tokens}"


def names_of(
    target: TargetInfo,
    drafter: Drafter,
    verifier: Verifier,
    acceptance: AcceptancePolicy,
    rollbacks: Mapping[CacheKind, CacheRollback],
    width: WidthPolicy,
) -> dict[str, str]:
    """What a pipeline is made of, for people."""
    return {
        "target": target.name,
        "adapter": target.adapter,
        "drafter": drafter.info.name,
        "verifier": verifier.info.name,
        "acceptance": acceptance.info.name,
        "rollback": rollback_name(rollbacks),
        "width": width_name(width),
    }
