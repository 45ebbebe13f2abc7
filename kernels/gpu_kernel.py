"""A kernel of a small operation on one backend, as whoever chooses, lists and checks it sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from draftloom.contracts import TargetInfo

from .backend import ON_CPU, Backend, KernelLauncher
from .check import Check

__all__ = ["GpuKernel"]


class GpuKernel:
    """What `draftloom.kernels` asks of an implementation, for a kernel that launchers run.

    Args:
        launcher: runs it.
        timed: names of the backends on which it was timed and found to pay.
        unsupported: why it cannot serve a request (hashable, with its ``device``), or None.
        checks: its parity checks, by name of the backend.
        why_not_for: why a target has no use for it, or None.

    Attributes:
        LAUNCHER: as above.
        BACKEND: its compiler.
    """

    def __init__(
        self,
        launcher: KernelLauncher,
        timed: frozenset[str],
        unsupported: Callable[[Any], str | None],
        checks: Callable[[str], Iterator[Check]],
        why_not_for: Callable[[TargetInfo], str | None] = lambda target: None,
    ) -> None:
        self.LAUNCHER = launcher
        self.BACKEND: Backend = launcher.backend
        self.why_not_for = why_not_for
        self._timed = timed
        self._unsupported = unsupported
        self._checks = checks

    def why_not_here(self) -> str | None:
        """None if it can run on the default device, else the reason why not."""
        return self.BACKEND.why_not_here()

    def by_default(self) -> bool:
        """Whether `auto` takes this kernel here."""
        return self.BACKEND.name in self._timed and self.why_not_here() is None

    def checks(self) -> Iterator[Check]:
        """Parity with the reference."""
        return self._checks(self.BACKEND.name)

    def supports(self, request: Any) -> str | None:
        """None if this kernel can serve the request here, else the reason why not."""
        on_cpu = None if request.device == "gpu" else ON_CPU
        return on_cpu or self.why_not_here() or self._unsupported(request)
