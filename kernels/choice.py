"""Which implementation of an operation serves a request: one rule for small operations.

Array code serves everything. A kernel serves what it says it supports, where it was named, or,
where nothing was named, on backends on which it was timed and found to pay.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import attrs

__all__ = ["ARRAY", "Choice", "Operation"]

ARRAY = "array"
UNTIMED = "it serves this layer, and was not timed on such a device yet: name it to run it"
_log = logging.getLogger("draftloom.kernels")


@attrs.frozen
class Choice:
    """What was decided.

    Attributes:
        name: ``array``, the name of a kernel, or a third party's.
        reason: one sentence for people.
        implementation: the object that runs it.
        rejected: for each kernel passed over, why.
    """

    name: str
    reason: str
    implementation: Any
    rejected: tuple[tuple[str, str], ...] = ()


@attrs.frozen(eq=False)
class Operation:
    """The implementations of an operation.

    Attributes:
        name: as registered.
        array: runs it in array code.
        kernels: by backend: a `GpuKernel`, or what has its ``why_not_here()``,
            ``supports(request)`` and ``LAUNCHER``.
        timed: names of kernels that were timed and found to pay: `auto` runs those.
    """

    name: str
    array: Any
    kernels: Mapping[str, Any]
    timed: frozenset[str]

    def default(self) -> str:
        """What `auto` runs on the default device."""
        here = (n for n in sorted(self.timed) if self.kernels[n].why_not_here() is None)
        return next(here, ARRAY)

    def wanted(self, use: Any) -> Any:
        """What a choice (None is `auto`) asks for in place of array code on the default device;
        None where it asks for nothing else."""
        use = self.default() if use is None else use
        return None if use == ARRAY else use

    def choose(self, request: Any, use: Any = None) -> Choice:
        """The implementation that serves a request; the same one is decided, and logged, once.

        Args:
            request: what the call asks; hashable.
            use: ``array`` or the name of a kernel; a third party's object with ``name``,
                ``supports(request)`` and what runs the operation; None to choose.

        Returns:
            The choice. What is wanted and does not serve the request gives way to array code.

        Raises:
            ValueError: if ``use`` is a name that is no implementation.
        """
        return _choose(self, request, self.default() if use is None else use, use is None)


@lru_cache(maxsize=1024)
def _choose(operation: Operation, request: Any, wanted: Any, chosen: bool) -> Choice:
    if wanted == ARRAY:
        reason = "no kernel is known to pay here" if chosen else "it was asked for"
        others = ((n, one.supports(request) or UNTIMED) for n, one in operation.kernels.items())
        choice = Choice(ARRAY, reason, operation.array, tuple(others) if chosen else ())
    else:
        if isinstance(wanted, str) and wanted not in operation.kernels:
            known = (ARRAY, *operation.kernels)
            raise ValueError(f"no implementation {wanted!r} of {operation.name}; there are {known}")
        own = not isinstance(wanted, str)
        name, one = (wanted.name, wanted) if own else (wanted, operation.kernels[wanted])
        refused = one.supports(request)
        if refused is None:
            choice = Choice(name, "it serves this layer", one if own else one.LAUNCHER)
        else:
            reason = "what was asked for does not serve it"
            choice = Choice(ARRAY, reason, operation.array, ((name, refused),))
    passed = "; ".join(f"not {name}: {why}" for name, why in choice.rejected)
    _log.info(
        "%s: %s (%s)%s", operation.name, choice.name, choice.reason, passed and f" [{passed}]"
    )
    return choice
