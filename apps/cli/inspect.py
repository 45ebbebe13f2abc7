"""`draftloom inspect`: what a model folder is, as draftloom reads it. No weight is loaded."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer

from .doctor import CONTEXT
from .offline import OfflineOption
from .options import JsonOption
from .state import state_of

if TYPE_CHECKING:
    from draftloom.model_info import ModelInfo
    from draftloom.plugins import PluginManager

__all__ = ["inspect", "report"]

ModelArgument = Annotated[
    str, typer.Argument(metavar="DIR|REPO", help="A folder, or OWNER/NAME[@REVISION] of the hub.")
]


def inspect(
    context: typer.Context,
    model: ModelArgument,
    as_json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Say what a model folder is: a target with its adapter and caches, or a drafter with its
    format, or what keeps it from being either (exit code 2)."""
    found = report(state_of(context).plugins, model)
    if as_json:
        typer.echo(json.dumps(found))
        return
    shown = {name: value for name, value in found.items() if value not in ([], {}, None)}
    width = max(map(len, shown))
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {_text(value)}")


def report(plugins: PluginManager, reference: str) -> dict[str, Any]:
    """What a model is, as plain data; what a drafter does not have is left out.

    Raises:
        ModelError: it cannot be found or read, or nobody serves it.
    """
    from draftloom.model_info import ModelInfo

    path = plugins.locate_model(reference)
    model = ModelInfo.from_path(path, reference or str(path))
    description = plugins.describe_checkpoint(model)
    if description is not None:
        fields = _plain(description)
        known = {k: v for k, v in fields.items() if v is not None}
        return {"kind": "drafter checkpoint", **known, "memory": _memory(plugins, model, None)}
    component = plugins.adapter_for(model)
    adapter = component.load()
    target = attrs.evolve(adapter.describe(model), adapter=component.name)
    memory = _memory(plugins, model, adapter)
    return {"kind": "target", "path": str(path), **_plain(target), "memory": memory}


def _memory(plugins: PluginManager, model: ModelInfo, adapter: Any) -> dict[str, Any]:
    """Bytes of the weights once loaded, and of a target's caches at `CONTEXT` tokens; None is not
    known (weights that are not downloaded)."""
    from draftloom.memory import Sketches, cache_costs

    weights = plugins.estimate_weights(model, "auto")
    found = {"unit": "bytes", "weights": None if weights is None else weights.size}
    if adapter is None:
        return found
    caches = None
    if weights is not None and isinstance(adapter, Sketches):
        costs, _ = cache_costs(*adapter.sketch(model, weights.dtype), None)
        caches = sum(cost.at(CONTEXT) for cost in costs)
    return {**found, "caches": caches, "context_length": CONTEXT}


def _plain(value: Any) -> Any:
    """Attrs classes as objects, everything else as JSON has it."""
    if attrs.has(type(value)):
        return {a.name: _plain(getattr(value, a.name)) for a in attrs.fields(type(value))}
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value)
