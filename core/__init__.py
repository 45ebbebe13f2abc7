"""draftloom: composable lossless speculative decoding on MLX.

A small drafter proposes a block of tokens, the target verifies them in one pass, an acceptance
policy keeps the right prefix, a rollback takes the caches back. Every part is a component behind
a pluggy hook; a builder wires parts into a checked graph. Importing this has no side effects,
and is quick: names are loaded from their modules at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftloom.abilities import (
        Bindable,
        BindContext,
        Calibratable,
        Checkable,
        DraftsInPart,
        Parkable,
        Reporting,
        Resolvable,
        Tunable,
    )
    from draftloom.api import load, stream_generate
    from draftloom.blueprint import Blueprint
    from draftloom.builder import PipelineBuilder
    from draftloom.checkpoint import (
        CandidateSelector,
        ConfidenceHead,
        DrafterDescription,
        DynamicConvolution,
        MarkovHead,
        WindowRule,
    )
    from draftloom.contracts import (
        AcceptancePolicy,
        CacheKind,
        CacheRollback,
        ComponentInfo,
        CycleNode,
        Draft,
        Drafter,
        DraftLaw,
        DraftRequest,
        DraftSession,
        LayerSpeculation,
        LoadedModel,
        Need,
        Port,
        Preserves,
        Speculation,
        TargetAdapter,
        TargetInfo,
        TargetOutput,
        Verifier,
        Width,
        WidthPolicy,
    )
    from draftloom.errors import (
        CheckpointWarning,
        DrafterFallbackWarning,
        DrafterMismatchWarning,
        DraftloomError,
        GenerationError,
        GraphError,
        MemoryGuardWarning,
        MemoryLimitError,
        ModelError,
        PluginError,
        Problem,
        UnknownNameError,
        UnsupportedModelError,
        UsageError,
    )
    from draftloom.estimate import MemoryEstimate
    from draftloom.events import (
        CycleEvent,
        FailureEvent,
        GenerationStats,
        MismatchEvent,
        PrefillEvent,
        TokenLogprob,
    )
    from draftloom.graph import Graph, Node
    from draftloom.hookspecs import Register, hookimpl
    from draftloom.kernel_settings import KernelSettings
    from draftloom.kv_cache import KVQuantization
    from draftloom.memory import MemorySettings, MemoryUse, WeightEstimate
    from draftloom.model_info import ModelInfo
    from draftloom.pipeline import (
        Chunk,
        GenerateOptions,
        GenerationResult,
        Pipeline,
        TextGeneration,
    )
    from draftloom.plugins import PluginManager
    from draftloom.sampling import LogitsProcessor, SamplingParams, SamplingState
    from draftloom.spec import ComponentSpec, InsertSpec, PipelineSpec

__version__ = "0.1.0"

__all__ = [
    "AcceptancePolicy",
    "BindContext",
    "Bindable",
    "Blueprint",
    "CacheKind",
    "CacheRollback",
    "Calibratable",
    "CandidateSelector",
    "Checkable",
    "CheckpointWarning",
    "Chunk",
    "ComponentInfo",
    "ComponentSpec",
    "ConfidenceHead",
    "CycleCosts",
    "CycleEvent",
    "CycleNode",
    "Draft",
    "DraftLaw",
    "DraftRequest",
    "DraftSession",
    "Drafter",
    "DrafterDescription",
    "DrafterFallbackWarning",
    "DrafterMismatchWarning",
    "DraftloomError",
    "DraftsInPart",
    "DynamicConvolution",
    "FailureEvent",
    "GenerateOptions",
    "GenerationError",
    "GenerationResult",
    "GenerationStats",
    "Graph",
    "GraphError",
    "InsertSpec",
    "KVQuantization",
    "KernelSettings",
    "LayerSpeculation",
    "LoadedModel",
    "LogitsProcessor",
    "MarkovHead",
    "MemoryEstimate",
    "MemoryGuardWarning",
    "MemoryLimitError",
    "MemorySettings",
    "MemoryUse",
    "MismatchEvent",
    "ModelError",
    "ModelInfo",
    "Need",
    "Node",
    "Parkable",
    "Pipeline",
    "PipelineBuilder",
    "PipelineSpec",
    "PluginError",
    "PluginManager",
    "Port",
    "PrefillEvent",
    "Preserves",
    "Problem",
    "Register",
    "Reporting",
    "Resolvable",
    "SamplingParams",
    "SamplingState",
    "Speculation",
    "TargetAdapter",
    "TargetInfo",
    "TargetOutput",
    "TextGeneration",
    "TokenLogprob",
    "Tunable",
    "UnknownNameError",
    "UnsupportedModelError",
    "UsageError",
    "Verifier",
    "WeightEstimate",
    "Width",
    "WidthPolicy",
    "WindowRule",
    "__version__",
    "hookimpl",
    "load",
    "stream_generate",
]

_EXPORTS = {
    "api": (
        "load",
        "stream_generate",
    ),
    "builder": ("PipelineBuilder",),
    "checkpoint": (
        "CandidateSelector",
        "ConfidenceHead",
        "DrafterDescription",
        "DynamicConvolution",
        "MarkovHead",
        "WindowRule",
    ),
    "abilities": (
        "BindContext",
        "Bindable",
        "Calibratable",
        "Checkable",
        "DraftsInPart",
        "Parkable",
        "Reporting",
        "Resolvable",
        "Tunable",
    ),
    "contracts": (
        "AcceptancePolicy",
        "CacheKind",
        "CacheRollback",
        "ComponentInfo",
        "CycleNode",
        "Draft",
        "Drafter",
        "DraftLaw",
        "DraftRequest",
        "DraftSession",
        "LayerSpeculation",
        "LoadedModel",
        "Need",
        "Port",
        "Preserves",
        "Speculation",
        "TargetAdapter",
        "TargetInfo",
        "TargetOutput",
        "Verifier",
        "Width",
        "WidthPolicy",
    ),
    "errors": (
        "CheckpointWarning",
        "DrafterFallbackWarning",
        "DrafterMismatchWarning",
        "DraftloomError",
        "GenerationError",
        "GraphError",
        "MemoryGuardWarning",
        "MemoryLimitError",
        "ModelError",
        "PluginError",
        "Problem",
        "UnknownNameError",
        "UnsupportedModelError",
        "UsageError",
    ),
    "events": (
        "CycleEvent",
        "FailureEvent",
        "GenerationStats",
        "MismatchEvent",
        "PrefillEvent",
        "TokenLogprob",
    ),
    "graph": (
        "Graph",
        "Node",
    ),
    "hookspecs": (
        "Register",
        "hookimpl",
    ),
    "estimate": ("MemoryEstimate",),
    "kernel_settings": ("KernelSettings",),
    "kv_cache": ("KVQuantization",),
    "memory": ("MemorySettings", "MemoryUse", "WeightEstimate"),
    "model_info": ("ModelInfo",),
    "pipeline": (
        "Chunk",
        "GenerateOptions",
        "GenerationResult",
        "Pipeline",
        "TextGeneration",
    ),
    "plugins": ("PluginManager",),
    "resolver": ("Blueprint",),
    "sampling": (
        "LogitsProcessor",
        "SamplingParams",
        "SamplingState",
    ),
    "spec": (
        "ComponentSpec",
        "InsertSpec",
        "PipelineSpec",
    ),
}
"""The modules of core, and what each gives to the public API."""

_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
