"""What a component may be able to do besides its contract: each a small protocol of its own.

A component that has the methods has the ability; nothing is inherited or declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs
import mlx.core as mx

from draftloom.contracts import Draft, Speculation, TargetAdapter, TargetInfo
from draftloom.errors import Problem
from draftloom.kernel_settings import KernelSettings

if TYPE_CHECKING:
    from draftloom.costs import CycleCosts
    from draftloom.sampling import SamplingParams, SamplingState

__all__ = [
    "BindContext",
    "Bindable",
    "Calibratable",
    "Checkable",
    "DraftsAhead",
    "DraftsInPart",
    "Parkable",
    "Reporting",
    "Resolvable",
    "Traces",
    "Tunable",
    "serving",
]


@attrs.frozen(eq=False)
class BindContext:
    """What the builder hands to a component that wants to be bound to the target.

    Attributes:
        target: the loaded target.
        dtype: name of the compute type asked for (``auto``, ``float32``, ...).
        open_model: load another model (folder) as a target adapter of its own.
        open_rollback: a rollback over all caches of an adapter: (cache, block) -> Speculation.
        kernels: which implementation each kernel operation is to run.
    """

    target: TargetAdapter
    dtype: str
    open_model: Callable[[Path], TargetAdapter]
    open_rollback: Callable[[TargetAdapter], Callable[[list[Any], mx.array], Speculation]]
    kernels: KernelSettings = attrs.Factory(KernelSettings)


@runtime_checkable
class Bindable(Protocol):
    """A component that loads weights or keeps the target."""

    def bind(self, context: BindContext) -> None:
        """Called once, after the graph has passed every check."""


@runtime_checkable
class Tunable(Protocol):
    """An adapter, a rollback or another component whose kernels can be chosen."""

    def tune(self, settings: KernelSettings) -> None:
        """Run these implementations from now on; called once, before drafters are bound."""


@runtime_checkable
class Traces(Protocol):
    """An adapter that may keep the graphs of its passes.

    Attributes:
        traces: whether it does: a pass of a length that was seen before costs less than a new one.
    """

    traces: bool


@runtime_checkable
class Checkable(Protocol):
    """A component that can tell from the target's description that it will not work."""

    def check(self, target: TargetInfo) -> Iterable[Problem]:
        """Every problem it sees; called before any weight is loaded."""


@runtime_checkable
class DraftsInPart(Protocol):
    """A draft session for which a slot that nobody verifies is cheaper than one that is."""

    def propose_first(
        self, anchor: mx.array, width: int, count: int, sampling: SamplingState
    ) -> Draft:
        """The first `count` (>= 1) of up to `width` (>= `count`) tokens that `propose` would give.
        Called in its place where fewer tokens are verified than slots are filled."""


@runtime_checkable
class DraftsAhead(Protocol):
    """A draft session that can draft while the host does not know yet what was kept.

    Attributes:
        ahead: whether it can as it is built and tuned.
    """

    ahead: bool

    def propose_ahead(
        self, features: mx.array, kept: mx.array, anchor: mx.array, width: int, count: int
    ) -> mx.array | None:
        """The tokens that these two would give: `observe` of the first `kept` ([1] int32, on the
        device) of the features [1, T, F], and `propose_first` with the rest of the arguments. Both
        are called afterwards, once the host knows; where they ask for the same, or for fewer
        tokens, the draft is there. Called in greedy decoding only.

        Returns:
            Lazy tokens, to be launched; None where this draft cannot be made ahead.
        """


@runtime_checkable
class Parkable(Protocol):
    """A width policy that can stop drafting for good."""

    def park(self) -> bool:
        """Drafter and target do not belong together: draft no more, if that is wanted.

        Returns:
            Whether it drafts no more.
        """


@runtime_checkable
class Calibratable(Protocol):
    """A width policy that wants to know beforehand what cycles cost.

    Attributes:
        calibrate: ``cached`` (measured once and kept), ``fresh`` (measured now) or ``off``.
    """

    calibrate: str

    def take_costs(self, costs: CycleCosts) -> None:
        """Costs of this pipeline on this machine; before its first generation."""


@runtime_checkable
class Reporting(Protocol):
    """A width policy that can say what it chooses and why."""

    def report(self) -> str:
        """One line for people; empty where there is nothing to say yet."""


@runtime_checkable
class Resolvable(Protocol):
    """A policy that stands for another one, chosen by the request."""

    def resolve(self, params: SamplingParams) -> Any:
        """The policy that serves a request with these parameters."""


def serving(policy: Any, params: SamplingParams) -> Any:
    """The policy that serves a request: the one that a `Resolvable` stands for, else itself."""
    return policy.resolve(params) if isinstance(policy, Resolvable) else policy
