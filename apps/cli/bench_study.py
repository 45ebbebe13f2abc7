"""What `draftloom bench` looks into besides speed: `--ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import say_note

if TYPE_CHECKING:
    from draftloom.apps.bench.ablate import Ablation
    from draftloom.builder import PipelineBuilder

__all__ = ["Study"]


class Study:
    """An ablation, where it was asked for; else nothing.

    Args:
        ablate: whether it was.
        only: operations to look at; any asks for it.
    """

    def __init__(self, ablate: bool, only: Sequence[str] = ()) -> None:
        self._ablate = ablate or bool(only)
        self._only = tuple(only)
        self._ablation: Ablation | None = None

    def vary(
        self, builders: Sequence[tuple[str, PipelineBuilder]]
    ) -> Sequence[tuple[str, PipelineBuilder]]:
        """The pipelines to run.

        Raises:
            UsageError, ModelError, GraphError: see `plan_ablation`.
        """
        if not self._ablate:
            return builders
        from draftloom.apps.bench.ablate import plan_ablation

        self._ablation = plan_ablation(builders, self._only)
        return self._ablation.builders

    def say_left_out(self) -> None:
        """What is not measured, and why, on stderr."""
        for name, reason in () if self._ablation is None else self._ablation.left_out:
            say_note(f"not measured: {name}: {reason}")

    def complete(self, report: dict[str, Any]) -> None:
        """Add what was found to a report."""
        if self._ablation is not None:
            from draftloom.apps.bench.ablate import add_worth

            add_worth(report, self._ablation)
