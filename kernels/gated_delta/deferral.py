"""Whether a replay waits for the next block: the kernel operation ``replay-verify``."""

from __future__ import annotations

from collections.abc import Iterator

from draftloom.device import on_cuda
from draftloom.kernels.check import Check

from .targets import why_not_for

__all__ = ["TIMED", "by_default", "checks", "why_not_for"]

TIMED = True
"""Whether it was timed on CUDA and found to pay there: a commit takes a third of the time."""


def by_default() -> bool:
    """Whether `auto` lets replays wait here. On the CPU there is no launch to save."""
    return TIMED and on_cuda()


def checks() -> Iterator[Check]:
    """Parity with the reference of what runs here, replay and block in one call."""
    from .checks import CASES, checks_of
    from .dispatch import choose

    names = {choose(case.request("replay_verify")).name for case in CASES}
    for name in sorted(names):
        yield from (c for c in checks_of(name) if c.name.startswith("replay_verify"))
