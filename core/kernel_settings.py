"""Which implementation every kernel operation runs: the switches of a pipeline.

An operation (``gated-delta``, ``fixed-length-caches``, ...) has implementations, registered by the
hook `register_kernels` under ``operation/implementation``. A pipeline chooses one of them by name,
or ``off`` (the stock path: what runs without this project's kernel), or ``auto``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from draftloom.builtins import BUILTIN_PLUGINS
from draftloom.errors import Problem, UsageError, did_you_mean
from draftloom.self_test_record import SelfTestRecord

if TYPE_CHECKING:
    from draftloom.contracts import TargetInfo
    from draftloom.plugins import PluginManager

__all__ = [
    "AUTO",
    "OFF",
    "Implementation",
    "KernelSettings",
    "implementations",
    "operations",
    "resolve_kernels",
    "tune_by_default",
    "without_use",
]

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
        notes: what the self-test turned off, in words; filled in then as well.
    """

    choices: tuple[tuple[str, str], ...] = attrs.field(default=(), converter=_pairs)
    plugins: tuple[tuple[str, Any], ...] = attrs.field(default=(), eq=False, repr=False)
    notes: tuple[str, ...] = attrs.field(default=(), eq=False, repr=False)

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


@attrs.frozen
class Implementation:
    """What is known of a registered implementation.

    Attributes:
        operation, name: ``operation/name`` is what it is registered as.
        summary: one line.
        factory: the implementation itself, as `draftloom.kernels` describes one.
        built_in: whether it is the project's own.
        why_not_here: why it cannot run on the default device; None where it can.
        by_default: whether ``auto`` runs it here.
        stock: whether it is what ``off`` means.
    """

    operation: str
    name: str
    summary: str
    factory: Any
    built_in: bool
    why_not_here: str | None
    by_default: bool
    stock: bool

    @property
    def full_name(self) -> str:
        """``operation/name``."""
        return f"{self.operation}/{self.name}"

    def why_not_for(self, target: TargetInfo) -> str | None:
        """Why it has nothing to do in a target; None where it may have."""
        ask = getattr(self.factory, "why_not_for", None)
        return None if ask is None else ask(target)

    def why_not_with(self, settings: KernelSettings) -> str | None:
        """Why it has nothing to do beside other choices; None where it may have."""
        ask = getattr(self.factory, "why_not_with", None)
        return None if ask is None else ask(settings)


def implementations(plugins: PluginManager) -> list[Implementation]:
    """Every registered implementation, in order of registration.

    Raises:
        PluginError: one cannot be imported.
    """
    return [_implementation(plugins, name) for name in plugins.names("kernel")]


def _implementation(plugins: PluginManager, full: str) -> Implementation:
    component = plugins.component("kernel", full)
    factory = component.load()
    operation, _, name = full.partition("/")
    reason = factory.why_not_here() if hasattr(factory, "why_not_here") else None
    return Implementation(
        operation=operation,
        name=name,
        summary=component.info.summary,
        factory=factory,
        built_in=component.plugin in BUILTIN_PLUGINS,
        why_not_here=reason,
        by_default=reason is None and hasattr(factory, "by_default") and factory.by_default(),
        stock=getattr(factory, "STOCK", False),
    )


def operations(plugins: PluginManager) -> dict[str, list[str]]:
    """The implementations of every registered operation, in order of registration."""
    found: dict[str, list[str]] = {}
    for full in plugins.names("kernel"):
        operation, _, implementation = full.partition("/")
        found.setdefault(operation, []).append(implementation)
    return found


def resolve_kernels(
    settings: KernelSettings, plugins: PluginManager, record: SelfTestRecord | None = None
) -> tuple[KernelSettings, list[Problem]]:
    """Check every choice against what is registered, runs here, and passed the self-test.

    Args:
        settings: as written.
        plugins: where implementations are registered.
        record: of the self-test; by default this user's.

    Returns:
        The settings with third parties' implementations filled in and what failed the self-test
        turned off, and every problem.

    Raises:
        PluginError: an implementation cannot be imported.
    """
    record = SelfTestRecord.load() if record is None else record
    failed = {} if record is None else record.failed
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
        found = _implementation(plugins, f"{operation}/{choice}")
        if found.why_not_here is not None:
            message = f"{found.full_name} cannot run here: {found.why_not_here}"
            problems.append(Problem("kernels", message, "choose auto or off"))
        elif found.full_name in failed:
            message = f"{found.full_name} failed the self-test here: {failed[found.full_name]}"
            hint = "choose off; `draftloom doctor --self-test` tests it again"
            problems.append(Problem("kernels", message, hint))
        if not found.built_in:
            objects.append((operation, found.factory))
    turned_off, notes = _turned_off(settings, plugins, known, failed)
    if record is not None and record.ignored:
        notes.append(f"the self-test's record is left aside: {record.ignored}")
    choices = (*settings.choices, *((operation, OFF) for operation in turned_off))
    return KernelSettings(choices, tuple(objects), tuple(notes)), problems


def without_use(settings: KernelSettings, plugins: PluginManager, target: TargetInfo) -> list[str]:
    """Of the implementations chosen by name, which have nothing to do in a target or beside the
    other choices, and why.

    Args:
        settings: without problems.
        plugins: where implementations are registered.
        target: from the adapter's `describe`.
    """
    chosen = [f"{operation}/{choice}" for operation, choice in settings.choices if choice != OFF]
    found = [_implementation(plugins, full) for full in chosen]
    reasons = [
        (one.full_name, one.why_not_for(target) or one.why_not_with(settings)) for one in found
    ]
    return [f"{name} has no use here: {reason}" for name, reason in reasons if reason is not None]


def tune_by_default(component: Any, plugins: PluginManager) -> None:
    """Turn off in a component what failed the self-test here, where no pipeline does so."""
    if hasattr(component, "tune"):
        component.tune(resolve_kernels(KernelSettings(), plugins)[0])


def _turned_off(
    settings: KernelSettings,
    plugins: PluginManager,
    known: Mapping[str, list[str]],
    failed: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Operations whose ``auto`` would run what failed, and what to say of it."""
    turned_off: list[str] = []
    notes = []
    for full, reason in failed.items():
        operation, _, name = full.partition("/")
        if name not in known.get(operation, ()) or settings.choice(operation) != AUTO:
            continue
        found = _implementation(plugins, full)
        if not found.by_default:
            continue
        if found.stock:
            notes.append(f"{full} failed the self-test ({reason}) and has no replacement")
        elif operation not in turned_off:
            turned_off.append(operation)
            notes.append(f"{operation} is off: {full} failed the self-test ({reason})")
    return turned_off, notes
