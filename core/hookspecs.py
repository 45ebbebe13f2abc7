"""Every hook of draftloom. A plugin implements the ones it wants with `@draftloom.hookimpl`.

A plugin is an object (usually a module) named by one entry point in group ``draftloom``.
Three groups: *register* hooks are collected from every plugin, *resolve* hooks stop at the first
answer (third parties are asked before the built-ins), *observe* hooks are told what happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from draftloom.checkpoint import DrafterDescription
    from draftloom.contracts import CacheKind, ComponentInfo, LoadedModel, TargetInfo
    from draftloom.errors import Problem
    from draftloom.events import (
        CycleEvent,
        FailureEvent,
        GenerationStats,
        MismatchEvent,
        PrefillEvent,
    )
    from draftloom.graph import Graph
    from draftloom.memory import WeightEstimate
    from draftloom.model_info import ModelInfo
    from draftloom.spec import ComponentSpec

__all__ = ["PROJECT", "Register", "hookimpl"]

PROJECT = "draftloom"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook of its name."""


class Register(Protocol):
    """What a register hook is given."""

    def __call__(self, name: str, factory: Any, info: ComponentInfo | None = None) -> None:
        """Offer a component.

        Args:
            name: lower case, words joined by hyphens; a third party puts its own name and a dot
                before it (``my-lab.entropy-probe``). A taken name is refused.
            factory: a class or function that makes the component from its options, or
                ``"module:attribute"`` to import on first use.
            info: needed where the factory has no `info` of its own.
        """


# --- register: called once a plugin manager, results of all plugins are collected -------------


@hookspec
def register_target_adapters(register: Register) -> None:
    """Offer target adapters (`TargetAdapterFactory`)."""


@hookspec
def register_drafters(register: Register) -> None:
    """Offer drafters (`Drafter`)."""


@hookspec
def register_verifiers(register: Register) -> None:
    """Offer verifiers (`Verifier`)."""


@hookspec
def register_acceptance_policies(register: Register) -> None:
    """Offer acceptance policies (`AcceptancePolicy`)."""


@hookspec
def register_cache_rollbacks(register: Register) -> None:
    """Offer cache rollbacks (`CacheRollback`)."""


@hookspec
def register_width_policies(register: Register) -> None:
    """Offer width policies (`WidthPolicy`)."""


@hookspec
def register_nodes(register: Register) -> None:
    """Offer nodes that users can insert into the cycle (`CycleNode`)."""


@hookspec
def register_kernels(register: Register) -> None:
    """Offer kernels; the name is ``op/implementation`` (``gated-delta/array``)."""


@hookspec
def register_commands(cli: Any) -> None:
    """Add commands to the command line; `cli` is the Typer application."""


# --- resolve: the first answer that is not None wins, third parties are asked first -----------


@hookspec(firstresult=True)
def locate_model(reference: str) -> Path | None:
    """The local folder of a model reference (folder, bundled name, hub repository).

    Called when a target, drafter checkpoint or draft model is named. Config and index suffice;
    weights come by `fetch_weights`. None: not mine.
    Raise `ModelError` for one that is mine and cannot be had.
    """


@hookspec
def fetch_weights(path: Path) -> None:
    """Bring what a model folder lacks of its weights, if it is yours.

    Called after the graph has passed every check, for each folder that a component was given. All
    plugins are asked; another's folder is left be. Raise `ModelError` where they cannot be had.
    """


@hookspec(firstresult=True)
def load_model(model: ModelInfo, dtype: str) -> LoadedModel | None:
    """Load weights and tokenizer of a model folder.

    Called after the graph has passed every check. `dtype` is ``auto`` or a type's name.
    """


@hookspec(firstresult=True)
def estimate_weights(model: ModelInfo, dtype: str) -> WeightEstimate | None:
    """What the weights of a model folder will take once `load_model` has loaded them.

    Called before anything is loaded, for the target and for folders that a drafter names. None:
    not known; nothing is counted then.
    """


@hookspec(firstresult=True)
def resolve_target_adapter(model: ModelInfo) -> str | None:
    """The name of the adapter that serves a model.

    Called once a target. When every plugin answers None, registered adapters are asked by
    `claims` in order of registration, third parties first.
    """


@hookspec(firstresult=True)
def resolve_cache_rollback(cache_kind: CacheKind, target: TargetInfo) -> str | None:
    """The name of the rollback for a kind of cache, where the user did not choose one."""


@hookspec(firstresult=True)
def resolve_drafter(target: TargetInfo, model: ModelInfo) -> ComponentSpec | None:
    """The drafter of a target, where the user did not choose one."""


@hookspec(firstresult=True)
def read_drafter_checkpoint(model: ModelInfo) -> DrafterDescription | None:
    """What a drafter checkpoint is, in the form that every drafter understands.

    Called when a checkpoint is named by folder or repository, and for the options of a drafter that
    name one (`ComponentInfo.checkpoint_options`). None: not my format. Raise `ModelError` for a
    config of your format that cannot be used; name the key.
    """


@hookspec(firstresult=True)
def resolve_drafter_checkpoint(
    model: ModelInfo, describe: Callable[[], DrafterDescription | None]
) -> ComponentSpec | None:
    """The drafter that serves a checkpoint the user named by folder or repository.

    `describe()` asks `read_drafter_checkpoint`.
    """


# --- check ----------------------------------------------------------------------------------


@hookspec
def check_graph(graph: Graph) -> Iterable[Problem]:
    """Problems of a graph, collected from all plugins before any weight is loaded."""


# --- observe: host side, after the device has been given its next work -----------------------


@hookspec
def prefill_finished(event: PrefillEvent) -> None:
    """The prompt is in the caches and the first token is known. Once a generation."""


@hookspec
def cycle_finished(event: CycleEvent) -> None:
    """A cycle has been committed and the next draft is on its way."""


@hookspec
def drafter_mismatched(event: MismatchEvent) -> None:
    """Acceptance says that drafter and target do not belong together.

    Called once a pipeline, after the cycle that made it certain.
    """


@hookspec
def generation_finished(event: GenerationStats) -> None:
    """A generation ended (stop, length, or cancelled)."""


@hookspec
def generation_failed(event: FailureEvent) -> None:
    """A generation ended in an error."""
