"""The plugin manager: finds plugins, collects components by kind and name, wraps every hook."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from draftloom import hookspecs
from draftloom.builtins import BUILTIN_PLUGINS, import_builtin
from draftloom.contracts import CacheKind, ComponentInfo, LoadedModel, TargetInfo
from draftloom.errors import (
    DraftloomError,
    PluginError,
    Problem,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
    did_you_mean,
)
from draftloom.model_info import ModelInfo

if TYPE_CHECKING:
    from draftloom.checkpoint import DrafterDescription
    from draftloom.graph import Graph
    from draftloom.memory import WeightEstimate
    from draftloom.spec import ComponentSpec

__all__ = ["KINDS", "Component", "PluginInfo", "PluginManager", "canonical"]

KINDS: Mapping[str, str] = {
    "adapter": "register_target_adapters",
    "drafter": "register_drafters",
    "verifier": "register_verifiers",
    "acceptance": "register_acceptance_policies",
    "rollback": "register_cache_rollbacks",
    "width": "register_width_policies",
    "node": "register_nodes",
    "kernel": "register_kernels",
}
"""Component kinds, and the hook that registers each."""


def canonical(name: str) -> str:
    """A component name as it is registered: lower case, hyphens for underscores."""
    return name.strip().lower().replace("_", "-")


@attrs.define
class Component:
    """A registered component.

    Attributes:
        kind: one of `KINDS`.
        name: the registered name.
        factory: class or function; a ``"module:attribute"`` until first used. A kernel may be any
            object, and the text the name of a module that is the kernel.
        plugin: name of the plugin that registered it.
        given_info: the info given at registration.
    """

    kind: str
    name: str
    factory: Any
    plugin: str
    given_info: ComponentInfo | None = None

    def load(self) -> Any:
        """The factory itself, imported where it was named by text.

        Raises:
            PluginError: the text names nothing that can be imported.
        """
        if isinstance(self.factory, str):
            module, _, attribute = self.factory.partition(":")
            try:
                found = importlib.import_module(module)
                whole = self.kind == "kernel" and not attribute
                self.factory = found if whole else getattr(found, attribute)
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                raise PluginError(
                    f"plugin {self.plugin!r} names {self.factory!r} for {self.kind} "
                    f"{self.name!r}, which cannot be imported: {error}"
                ) from error
        return self.factory

    @property
    def info(self) -> ComponentInfo:
        """What the component says about itself.

        Raises:
            PluginError: neither the registration nor the factory has an info.
        """
        if self.given_info is not None:
            return self.given_info
        info = getattr(self.load(), "info", None)
        if info is None and self.kind in ("adapter", "kernel"):
            summary = (inspect.getdoc(self.load()) or "").partition("\n")[0]
            return ComponentInfo(self.name, summary)
        if not isinstance(info, ComponentInfo):
            raise PluginError(
                f"{self.kind} {self.name!r} of plugin {self.plugin!r} has no ComponentInfo",
                "give the class an attribute `info`, or pass info= when registering",
            )
        return info

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options that the factory takes, by name."""
        factory = self.load()
        if inspect.isclass(factory) and factory.__init__ is object.__init__:
            return {}
        collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(factory).parameters
        return {name: p for name, p in parameters.items() if p.kind not in collecting}

    def make(self, options: Mapping[str, Any]) -> Any:
        """Make the component.

        Raises:
            UsageError: an option it does not take, or a required one is missing.
            DraftloomError: the factory refuses its options.
        """
        known = self.options
        for option in options:
            if option not in known:
                raise UsageError(
                    f"{self.kind} {self.name!r} has no option {option!r}",
                    did_you_mean(option, known),
                )
        for option, parameter in known.items():
            if parameter.default is inspect.Parameter.empty and option not in options:
                raise UsageError(f"{self.kind} {self.name!r} needs the option {option!r}")
        try:
            return self.load()(**options)
        except DraftloomError:
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.kind} {self.name!r}: {error}") from error


@attrs.frozen
class PluginInfo:
    """One plugin, for listings.

    Attributes:
        name: entry point name, or module.
        distribution: the installed package it came from; "draftloom" for the built-ins.
        version: of that package.
        hooks: the hooks it implements.
        components: (kind, name) of all it registered.
    """

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    components: tuple[tuple[str, str], ...]


class PluginManager:
    """All plugins of one process or one test: no global state, make as many as you like.

    Args:
        entry_points: also load third parties from entry point group ``draftloom``.
        extra: plugin objects to add by hand (modules, or objects with hook methods).

    Raises:
        PluginError: a plugin that cannot be imported, or registers a name that is taken.
    """

    def __init__(self, *, entry_points: bool = True, extra: Iterable[Any] = ()) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._distributions: dict[str, tuple[str, str]] = {}
        self._components: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
        for module in BUILTIN_PLUGINS:
            self._add(import_builtin(module), module, "draftloom", "")
        if entry_points:
            self._load_entry_points()
        for plugin in extra:
            name = getattr(plugin, "__name__", type(plugin).__name__)
            self._add(plugin, name, "(given by the program)", "")

    # --- loading -----------------------------------------------------------------------------

    def _load_entry_points(self) -> None:
        seen: dict[str, str] = {}
        for distribution in distributions():
            for entry in distribution.entry_points.select(group=hookspecs.PROJECT):
                owner = _owner(distribution)
                first = seen.setdefault(entry.name, owner[0])
                if first != owner[0]:
                    raise PluginError(
                        f"{first} and {owner[0]} both have a plugin named {entry.name!r}",
                        "uninstall one of them",
                    )
                if self._manager.has_plugin(entry.name):
                    continue  # the same distribution, found twice on the path
                try:
                    plugin = entry.load()
                except Exception as error:
                    raise PluginError(
                        f"plugin {entry.name!r} of {owner[0]} {owner[1]} cannot be imported: "
                        f"{type(error).__name__}: {error}",
                        f"repair or uninstall {owner[0]}",
                    ) from error
                self._add(plugin, entry.name, *owner)

    def _add(self, plugin: ModuleType | Any, name: str, distribution: str, version: str) -> None:
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name!r} of {distribution}: {error}") from error
        self._distributions[name] = (distribution, version)
        for kind, hook in KINDS.items():
            register = getattr(plugin, hook, None)
            if register is not None and self._manager.parse_hookimpl_opts(plugin, hook) is not None:
                self._collect(register, kind, name)

    def _collect(self, register: Any, kind: str, plugin: str) -> None:
        """Let a plugin register; whatever it raises is an error that names its distribution."""
        try:
            register(register=self._registrar(kind, plugin))
        except PluginError:
            raise
        except Exception as error:
            distribution, version = self._distributions[plugin]
            raise PluginError(
                f"plugin {plugin!r} of {distribution} {version} failed in {KINDS[kind]}: "
                f"{type(error).__name__}: {error}",
                f"repair or uninstall {distribution}",
            ) from error

    def _registrar(self, kind: str, plugin: str) -> hookspecs.Register:
        def register(name: str, factory: Any, info: ComponentInfo | None = None) -> None:
            taken = self._components[kind].get(name)
            if taken is not None:
                raise PluginError(
                    f"plugin {plugin!r} of {self._distributions[plugin][0]} registers {kind} "
                    f"{name!r}, which plugin {taken.plugin!r} has registered",
                    "put the plugin's own name before it: my-lab." + name,
                )
            if name != canonical(name):
                raise PluginError(
                    f"plugin {plugin!r} registers {kind} {name!r}",
                    f"names are lower case with hyphens: {canonical(name)!r}",
                )
            self._components[kind][name] = Component(kind, name, factory, plugin, info)

        return register

    # --- components --------------------------------------------------------------------------

    def component(self, kind: str, name: str) -> Component:
        """The component of a kind and name (underscores may stand for hyphens).

        Raises:
            UnknownNameError: there is none; names the nearest.
        """
        found = self._components[kind].get(canonical(name))
        if found is None:
            raise UnknownNameError(kind, name, self._components[kind])
        return found

    def names(self, kind: str) -> tuple[str, ...]:
        """All registered names of a kind, in order of registration."""
        return tuple(self._components[kind])

    def components(self, kind: str) -> tuple[Component, ...]:
        """All components of a kind, third parties first, then the built-ins."""
        found = self._components[kind].values()
        return tuple(sorted(found, key=lambda c: c.plugin in BUILTIN_PLUGINS))

    def plugins(self) -> tuple[PluginInfo, ...]:
        """Every plugin with what it brings."""
        listing = []
        for name, plugin in self._manager.list_name_plugin():
            callers = self._manager.get_hookcallers(plugin) or []
            brought = [
                (kind, c.name)
                for kind, components in self._components.items()
                for c in components.values()
                if c.plugin == name
            ]
            distribution, version = self._distributions[name]
            hooks = tuple(sorted(caller.name for caller in callers))
            listing.append(PluginInfo(name, distribution, version, hooks, tuple(brought)))
        return tuple(listing)

    # --- hooks, typed ------------------------------------------------------------------------

    @property
    def hook(self) -> Any:
        """pluggy's own relay, for hooks without a method here."""
        return self._manager.hook

    def locate_model(self, reference: str) -> Path:
        """The local folder of a model.

        Raises:
            ModelError: nobody knows it, or it cannot be had.
        """
        path = self.hook.locate_model(reference=reference)
        if path is None:
            raise UnsupportedModelError(
                f"{reference!r} is neither a model folder nor a hub repository",
                "give a folder with config.json, or OWNER/NAME",
            )
        return Path(path)

    def fetch_weights(self, path: Path) -> None:
        """Have plugins bring what a model folder lacks of its weights.

        Raises:
            ModelError: they cannot be had.
        """
        self.hook.fetch_weights(path=path)

    def load_model(self, model: ModelInfo, dtype: str) -> LoadedModel:
        """Weights and tokenizer of a model.

        Raises:
            ModelError: the weights are missing, corrupt, or of a kind nobody loads.
        """
        loaded = self.hook.load_model(model=model, dtype=dtype)
        if loaded is None:
            raise UnsupportedModelError(f"no plugin loads the weights of {model.name!r}")
        return loaded  # type: ignore[no-any-return]

    def estimate_weights(self, model: ModelInfo, dtype: str) -> WeightEstimate | None:
        """What the weights of a model will take; None where nobody knows."""
        return self.hook.estimate_weights(model=model, dtype=dtype)  # type: ignore[no-any-return]

    def adapter_for(self, model: ModelInfo) -> Component:
        """The adapter that serves a model.

        Raises:
            UnsupportedModelError: no adapter claims it; names those asked.
            PluginError: adapters of two plugins claim it, and nobody says which it is to be.
        """
        name = self.hook.resolve_target_adapter(model=model)
        if name is not None:
            return self.component("adapter", name)
        found: Component | None = None
        for component in self.components("adapter"):
            if component.plugin in BUILTIN_PLUGINS and found is not None:
                return found
            if not component.load().claims(model):
                continue
            if found is not None and found.plugin != component.plugin:
                raise PluginError(
                    f"model type {model.model_type!r} of {model.name} is claimed by two adapters: "
                    f"{found.name!r} of plugin {found.plugin!r} and {component.name!r} of plugin "
                    f"{component.plugin!r}",
                    "uninstall one of them, or answer the hook resolve_target_adapter",
                )
            found = found or component
            if found.plugin in BUILTIN_PLUGINS:
                return found
        if found is not None:
            return found
        asked = ", ".join(c.name for c in self.components("adapter")) or "none"
        raise UnsupportedModelError(
            f"no adapter claims model type {model.model_type!r} of {model.name}; asked: {asked}",
            "docs/how-to/write-an-adapter.md shows how to write one",
        )

    def rollback_for(self, kind: CacheKind, target: TargetInfo) -> str | None:
        """Name of the default rollback for a kind of cache; None where nobody has one."""
        return self.hook.resolve_cache_rollback(  # type: ignore[no-any-return]
            cache_kind=kind, target=target
        )

    def drafter_for(self, target: TargetInfo, model: ModelInfo) -> ComponentSpec | None:
        """The default drafter of a target; None where nobody knows one."""
        return self.hook.resolve_drafter(  # type: ignore[no-any-return]
            target=target, model=model
        )

    def describe_checkpoint(self, model: ModelInfo) -> DrafterDescription | None:
        """What a drafter checkpoint is; None where it is of no known format.

        Raises:
            ModelError: a config that cannot be used, or one for a drafter that nobody registers.
        """
        found: DrafterDescription | None = self.hook.read_drafter_checkpoint(model=model)
        if found is not None and found.drafter not in self._components["drafter"]:
            raise UnsupportedModelError(
                f"{model.name} is a checkpoint of format {found.format} for the drafter "
                f"{found.drafter!r}, which nobody registers",
                f"drafters: {', '.join(self.names('drafter'))}",
            )
        return found

    def drafter_for_checkpoint(self, model: ModelInfo) -> ComponentSpec | None:
        """The drafter that serves a checkpoint; None where nobody knows its format."""
        return self.hook.resolve_drafter_checkpoint(  # type: ignore[no-any-return]
            model=model, describe=partial(self.describe_checkpoint, model)
        )

    def check_graph(self, graph: Graph) -> list[Problem]:
        """Problems that plugins see in a graph."""
        return [p for found in self.hook.check_graph(graph=graph) for p in found or ()]


def _owner(distribution: Distribution) -> tuple[str, str]:
    return distribution.metadata["Name"] or "?", distribution.version
