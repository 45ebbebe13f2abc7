"""`draftloom plugins`: what is installed and what it brings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from .options import JsonOption
from .state import state_of

if TYPE_CHECKING:
    from draftloom.plugins import PluginInfo

__all__ = ["plugins"]


def plugins(context: typer.Context, as_json: JsonOption = False) -> None:
    """List plugins: name, version, hooks, components."""
    from draftloom import __version__

    listing = [_as_dict(info, __version__) for info in state_of(context).plugins.plugins()]
    if as_json:
        typer.echo(json.dumps(listing, indent=2))
        return
    for position, plugin in enumerate(listing):
        typer.echo(("\n" if position else "") + _describe(plugin))


def _as_dict(info: PluginInfo, own_version: str) -> dict[str, object]:
    components: dict[str, list[str]] = {}
    for kind, name in info.components:
        components.setdefault(kind, []).append(name)
    return {
        "name": info.name,
        "distribution": info.distribution,
        "version": info.version or (own_version if info.distribution == "draftloom" else ""),
        "hooks": list(info.hooks),
        "components": components,
    }


def _describe(plugin: dict[str, object]) -> str:
    hooks, components = plugin["hooks"], plugin["components"]
    if not isinstance(hooks, list) or not isinstance(components, dict):
        raise TypeError("made by _as_dict")
    source = f"{plugin['distribution']} {plugin['version']}".strip()
    lines = [f"{plugin['name']}  ({source})", f"  hooks       {', '.join(hooks) or 'none'}"]
    lines += [f"  {kind:<10}  {', '.join(names)}" for kind, names in components.items()]
    return "\n".join(lines)
