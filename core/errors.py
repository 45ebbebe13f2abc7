"""Every error draftloom raises on purpose: one line on what is wrong, one on what to do.

A user's mistake is a `DraftloomError`; the command line turns it into exit code 2.
`GenerationError` is the exception to that: the run failed, not the request (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import attrs

__all__ = [
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
    "did_you_mean",
]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which names exist and which one is nearest.

    Args:
        name: what was asked for.
        known: the names that exist.

    Returns:
        A hint such as ``did you mean 'greedy'? known: greedy, speculative-sampling``.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = f"known: {', '.join(names)}" if names else "none are registered"
    return f"did you mean {near[0]!r}? {listing}" if near else listing


class DraftloomError(Exception):
    """Base of all errors that draftloom raises on purpose.

    Attributes:
        message: what is wrong, one line.
        hint: what to do about it, one line; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(DraftloomError, ValueError):
    """An argument that cannot be honoured: out of range, empty, or contradicting another."""


class UnknownNameError(DraftloomError, LookupError):
    """A component name nobody registered; names the known ones and the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no {kind} named {name!r}", did_you_mean(name, known))
        self.kind = kind
        self.name = name


class ModelError(DraftloomError):
    """A model folder that is missing, half there, corrupt, or does not say what it is."""


class UnsupportedModelError(ModelError):
    """A model that no adapter claims."""


class MemoryLimitError(DraftloomError):
    """More memory would be needed than the process may take; has the numbers."""


class PluginError(DraftloomError):
    """A plugin that cannot be imported or registers what it must not; names its distribution."""


@attrs.frozen
class Problem:
    """One thing that keeps a graph from being built.

    Attributes:
        where: the node, port or key it concerns.
        message: what is wrong.
        hint: what to do; may be empty.
    """

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class GraphError(DraftloomError):
    """A pipeline that cannot be built. Lists every problem found, not only the first.

    Attributes:
        problems: all of them, in the order of the graph.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems: " if len(self.problems) > 1 else ""
        super().__init__(f"{count}{'; '.join(map(str, self.problems))}")


class GenerationError(DraftloomError):
    """The target, a policy or an inserted node failed in the middle of a generation.

    The caches are as they were before the failing cycle; nothing emitted is lost.

    Attributes:
        token_ids: tokens committed before the failure.
    """

    def __init__(self, message: str, hint: str = "", token_ids: Sequence[int] = ()) -> None:
        super().__init__(message, hint)
        self.token_ids = tuple(token_ids)


class CheckpointWarning(UserWarning):
    """A drafter checkpoint holds config keys that nobody reads; names them."""


class DrafterFallbackWarning(UserWarning):
    """Said once: the drafter failed and the target goes on alone. The text is unaffected."""


class DrafterMismatchWarning(UserWarning):
    """Said once: acceptance says that drafter and target do not belong together. The text is
    unaffected."""


class MemoryGuardWarning(UserWarning):
    """Memory is short, and something was made smaller for it. The text is unaffected."""
