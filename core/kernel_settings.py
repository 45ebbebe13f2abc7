"""Which implementation every kernel operation runs: the switches of a pipeline.

An operation (``gated-delta``, ``fixed-length-caches``, ...) has implementations, registered by the
hook `register_kernels` under ``operation/implementation``. A pipeline chooses one of them by name,
or ``off`` (the stock path: what runs without this project's kernel), or ``auto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from draftloom.errors import Problem, UsageError, did_you_mean

if TYPE_CHECKING:
    from draftloom.plugins import PluginManager

__all__ = ["AUTO", "OFF", "KernelSettings", "operations", "resolve_kernels"]

AUTO, OFF = "auto", "off"


def _name(text: str) -> str:
    return text.strip().lower().replace("_", "-")


def _pairs(value: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((op, choice) for op, choice in value if choice != AUTO))


@attrs.frozen
class KernelSettings:
    """Choices by operation.

    Attributes:
        choices: pairs (operation, choice), sorted; what is ``auto`` is left out.
        plugins: pairs (operation, implementation object) of the choices that a third party's
            plugin registered; filled in when a pipeline is checked.
    """

    choices: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs)
    plugins: tuple[tuple[str, Any], ...] = attrs.field(default=(), eq=False, repr=False)

    @classmethod
    def of(cls, value: Any) -> KernelSettings:
        """Read ``{gated-delta = "array", packed-projections = "off"}``.

        Raises:
            UsageError: no table, or a choice that is no name.
        """
        if isinstance(value, KernelSettings):
            return value
        if not isinstance(value, Mapping):
            raise UsageError(f"expected a table, got {value!r}", 'write { gated-delta = "off" }')
        for operation, choice in value.items():
            if not isinstance(choice, str) or not choice.strip():
                raise UsageError(
                    f"{operation} must be a name, got {choice!r}",
                    '"auto", "off", or an implementation',
                )
        return cls(tuple((_name(op), _name(choice)) for op, choice in value.items()))

    def on_top(self, value: Any) -> KernelSettings:
        """These settings with the choices of a mapping on top; ``auto`` takes one away.

        Raises:
            UsageError: as `of`.
        """
        if isinstance(value, Mapping):
            given = {_name(op): value[op] for op in value}
            return KernelSettings.of({**dict(self.choices), **given})
        return KernelSettings.of(value)

    def choice(self, operation: str) -> str:
        """``auto``, ``off``, or the name of an implementation."""
        return dict(self.choices).get(operation, AUTO)

    def is_off(self, operation: str) -> bool:
        """Whether the stock path is to run."""
        return self.choice(operation) == OFF

    def use(self, operation: str, off: str = "array") -> Any:
        """What a dispatcher takes.

        Args:
            operation: its name.
            off: the implementation that stands for the stock path.

        Returns:
            None for ``auto``; `off` for ``off``; else the name of the implementation, or the object
            itself where a third party registered it.
        """
        choice = self.choice(operation)
        if choice in (AUTO, OFF):
            return None if choice == AUTO else off
        return dict(self.plugins).get(operation, choice)

    def as_data(self) -> dict[str, str]:
        """A table of what is not ``auto``."""
        return dict(self.choices)

    def __str__(self) -> str:
        return ", ".join(f"{op} {choice}" for op, choice in self.choices) or AUTO


def operations(plugins: PluginManager) -> dict[str, list[str]]:
    """The implementations of every registered operation, in order of registration."""
    found: dict[str, list[str]] = {}
    for full in plugins.names("kernel"):
        operation, _, implementation = full.partition("/")
        found.setdefault(operation, []).append(implementation)
    return found


def resolve_kernels(
    settings: KernelSettings, plugins: PluginManager
) -> tuple[KernelSettings, list[Problem]]:
    """Check every choice against what is registered and runs here.

    Returns:
        The settings with third parties' implementations filled in, and every problem.

    Raises:
        PluginError: an implementation cannot be imported.
    """
    from draftloom.builtins import BUILTIN_PLUGINS

    known, problems, objects = operations(plugins), [], []
    for operation, choice in settings.choices:
        if operation not in known:
            hint = did_you_mean(operation, known)
            problems.append(Problem("kernels", f"no operation named {operation!r}", hint))
            continue
        if choice == OFF:
            continue
        if choice not in known[operation]:
            hint = did_you_mean(choice, [AUTO, OFF, *known[operation]])
            message = f"{operation!r} has no implementation {choice!r}"
            problems.append(Problem("kernels", message, hint))
            continue
        component = plugins.component("kernel", f"{operation}/{choice}")
        implementation = component.load()
        why_not = getattr(implementation, "why_not_here", None)
        reason = why_not() if why_not is not None else None
        if reason is not None:
            message = f"{operation}/{choice} cannot run here: {reason}"
            problems.append(Problem("kernels", message, "choose auto or off"))
        if component.plugin not in BUILTIN_PLUGINS:
            objects.append((operation, implementation))
    return attrs.evolve(settings, plugins=tuple(objects)), problems
