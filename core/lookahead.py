"""The next cycle, launched before the last one was read.

A cycle without draft tokens keeps its one token whatever it is, so that the next pass can be
launched on that token while it is still on the device: the host reads and makes text while the
device works, and the device finds its next work when it is done.

After a cycle with draft tokens the device knows how many were kept, and the host does not. Where
target, caches and drafter can all go on from there, the next block is launched just so; once the
host has read the number, the speculation of that block is settled. Where the text ends after all,
the pass is taken back as any speculation is.
"""

from __future__ import annotations

import mlx.core as mx

from draftloom.contracts import Draft, Speculation
from draftloom.graph import Plan
from draftloom.sampling import SamplingState

__all__ = ["Lookahead"]


class Lookahead:
    """At most one cycle in flight behind the one that is being read.

    Args:
        plan: a second frame for the graph's calls; cycles take turns on two.
        sampling: draws of a pass that is taken back are taken back too.

    Attributes:
        launched: whether a cycle is in flight.
        failed: whether one could not be launched; no other is tried.
    """

    def __init__(self, plan: Plan, sampling: SamplingState) -> None:
        self._plan = plan
        self._sampling = sampling
        self._mark: object = None
        self.failed = False
        self._width = 0  # draft tokens of the cycle before the one in flight
        self.launched = False

    def launch(self, current: Plan, draft: Draft) -> None:
        """Run the cycle after `current` up to its read. What that one's read waits for is on its
        way to the device.

        Args:
            current: of a cycle without draft tokens, or whose speculation `commits_ahead`.
            draft: of the next cycle; it has draft tokens if and only if this one has.
        """
        if self.failed:
            return
        width, num_accepted = current.get("draft").width, current.get("num_accepted")
        plan, self._mark = self._plan, self._sampling.mark()
        plan.set("speculation", None)
        plan.set("draft", draft)
        plan.set("anchor", current.get("next_token"))
        self.launched, self._width = True, width
        try:
            if width:
                current.get("speculation").commit_ahead(num_accepted)
            else:
                current.get("speculation").commit((0,))
            speculate, *rest = plan.verify
            speculate()
            if width:
                plan.get("speculation").follow(width - num_accepted)
            for step in rest:
                step()
            mx.async_eval(plan.get("num_accepted"), plan.get("next_token"))
        except Exception:  # noqa: BLE001 the same cycle is run again in its turn, and raises there
            self.failed = True
            self.drop()

    def settle(self, kept: int) -> None:
        """The host has read that the cycle before kept so many draft tokens."""
        if self._width:
            self._plan.get("speculation").settle(self._width - kept)

    def take(self, current: Plan) -> Plan:
        """The plan to go on with: the one of the cycle in flight, or `current`."""
        if not self.launched:
            return current
        self.launched = False
        self._plan, plan = current, self._plan
        return plan

    def drop(self) -> None:
        """Take the cycle in flight back."""
        if not self.launched:
            return
        self.launched = False
        speculation: Speculation | None = self._plan.get("speculation")
        if speculation is not None:
            speculation.abort()
        self._sampling.rewind(self._mark)
