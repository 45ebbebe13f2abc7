"""The next plain cycle, launched before the last one was read.

A cycle without draft tokens keeps its one token whatever it is, so that the next pass can be
launched on that token while it is still on the device: the host reads and makes text while the
device works, and the device finds its next work when it is done. Where the text ends after all,
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
    """

    def __init__(self, plan: Plan, sampling: SamplingState) -> None:
        self._plan = plan
        self._sampling = sampling
        self._mark: object = None
        self._failed = False
        self.launched = False

    def launch(self, current: Plan) -> None:
        """Run the cycle after `current` up to its read. `current` has no draft tokens, and what
        its read waits for is on its way to the device."""
        if self._failed:
            return
        current.get("speculation").commit((0,))
        plan, self._mark = self._plan, self._sampling.mark()
        plan.set("speculation", None)
        plan.set("draft", Draft.empty())
        plan.set("anchor", current.get("next_token"))
        self.launched = True
        try:
            for step in plan.verify:
                step()
            mx.async_eval(plan.get("num_accepted"), plan.get("next_token"))
        except Exception:  # noqa: BLE001 the same cycle is run again in its turn, and raises there
            self._failed = True
            self.drop()

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
