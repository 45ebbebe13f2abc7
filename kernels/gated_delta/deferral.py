"""Whether a replay waits for the next block: the kernel operation ``replay-verify``."""

from __future__ import annotations

from collections.abc import Iterator

from draftloom.device import on_gpu
from draftloom.kernels.check import Check

from .targets import why_not_for

__all__ = ["TIMED", "by_default", "checks", "why_not_for"]

TIMED = False
"""Whether it was timed in the cycle on a GPU and found to pay there: not yet."""


def by_default() -> bool:
    """Whether `auto` lets replays wait here. On the CPU there is no launch to save: never."""
    return TIMED and on_gpu()


def checks() -> Iterator[Check]:
    """Parity with the reference of what runs here, replay and block in one call."""
    from .checks import CASES, checks_of
    from .dispatch import choose

    names = {choose(case.request("replay_verify")).name for case in CASES}
    for name in sorted(names):
        yield from (c for c in checks_of(name) if c.name.startswith("replay_verify"))
