"""The mismatch alarm: does running acceptance say that drafter and target belong together?

A drafter that was made for another target, or is fed the wrong layers, is not wrong: the text is
the target's. It is only slow, and nobody is told. Here the first draft token of every cycle is
listened to, as a sequential test (Wald's) between two rates:

- `good`: what a drafter that belongs to the target reaches even on text that is hard for it;
- `bad`: what an unrelated one gets, a fifth of that.

Each cycle multiplies a likelihood ratio. It is a supermartingale as long as the chance of
acceptance, given everything before, is at least `good`; so the chance that it *ever* reaches
1 / `ERROR` is at most `ERROR`, however cycles depend on one another (Ville's inequality).
Repetition is what would break that premise: a text that goes round in circles asks the same
question again and again, so that a context of four tokens counts once.

``docs/explanation/mismatch.md`` has the reasons and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import attrs

from draftloom.abilities import Parkable
from draftloom.contracts import ComponentInfo, WidthPolicy
from draftloom.events import CycleEvent, GenerationStats, MismatchEvent
from draftloom.sampling import SamplingParams

__all__ = ["CONTEXT", "HOTTEST", "MismatchMonitor", "park"]

GOOD = 0.15
"""Least share of accepted first tokens that a drafter made for the target is expected to reach."""
SHARE_OF_STATED = 0.4
"""Where a checkpoint states its acceptance length: share of the rate it implies that hard text may
bring it down to."""
RATIO = 5.0
"""`good` over `bad`."""
ERROR = 1e-3
"""Chance of either wrong verdict at most."""
CONTEXT = 4
"""Tokens before a draft that make it the same question as an earlier one."""
HOTTEST = 1.0
"""Temperature up to which acceptance is listened to: above it the target itself draws at random,
and no drafter agrees with that."""
MOST = 4096
"""Contexts after which an undecided test gives up."""


class Request(Protocol):
    """What is known of a generation."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""

    @property
    def sampling(self) -> SamplingParams:
        """Parameters."""


class MismatchMonitor:
    """Listens to the cycles of one pipeline, over all its texts, until it knows.

    Args:
        info: of the drafter: whose drafts were made for one target (`ComponentInfo.paired`), and
            the acceptance length its checkpoint states, if any.

    Attributes:
        good, bad: first-token acceptance rates between which it decides, 0..1.
        verdict: None while undecided; True once drafter and target belong together; False once
            the alarm has rung.
        message: of the alarm; empty before it.
    """

    def __init__(self, info: ComponentInfo) -> None:
        self._info = info
        stated = info.stated_length
        rate = 0.0 if stated is None else 1 - 1 / max(stated, 1.0)
        self.good = max(GOOD, SHARE_OF_STATED * rate)
        self.bad = self.good / RATIO
        self._hit = math.log(self.bad / self.good)
        self._miss = math.log((1 - self.bad) / (1 - self.good))
        self._evidence = 0.0
        self._seen: set[tuple[int, ...]] = set()
        self._cycles = self._accepted = self._hits = 0
        self.verdict: bool | None = None
        self.message = ""

    def listen(
        self, event: CycleEvent, request: Request, emitted: Sequence[int]
    ) -> MismatchEvent | None:
        """`hear` a cycle of a request, unless it draws too hot.

        Args:
            event: the cycle.
            request: whose it is.
            emitted: tokens of the text, those of the cycle among them.
        """
        if self.verdict is not None or request.sampling.temperature > HOTTEST:
            return None
        before = len(emitted) - len(event.token_ids)
        text = (*request.prompt[-CONTEXT:], *emitted[max(0, before - CONTEXT) : before])
        return self.hear(event, text[-CONTEXT:])

    def hear(self, event: CycleEvent, context: Sequence[int]) -> MismatchEvent | None:
        """Take in a cycle; an event where this one made the alarm ring.

        Args:
            event: the cycle.
            context: the last `CONTEXT` tokens before the drafted ones, the anchor last.
        """
        if self.verdict is not None or not event.verified or event.source not in self._info.paired:
            return None
        self._cycles += 1
        self._accepted += event.accepted
        question = tuple(context)
        if question in self._seen:
            return None
        self._seen.add(question)
        self._hits += event.accepted > 0
        self._evidence += self._hit if event.accepted else self._miss
        if self._evidence <= math.log(ERROR):
            self.verdict = True
        elif self._evidence >= -math.log(ERROR):
            self.verdict = False
        elif len(self._seen) >= MOST:
            self.verdict = True
        if self.verdict is not None:
            contexts = len(self._seen)
            self._seen = set()
            return None if self.verdict else self._alarm(event.source, contexts)
        return None

    def _alarm(self, source: str, contexts: int) -> MismatchEvent:
        event = MismatchEvent(
            drafter=source,
            cycles=self._cycles,
            acceptance_length=1 + self._accepted / self._cycles,
            contexts=contexts,
            first_accepted=self._hits,
            unrelated_rate=self.bad,
            expected_rate=self.good,
            stated_length=self._info.stated_length,
        )
        self.message = event.message
        return event


def park(alarm: MismatchEvent, width: WidthPolicy, stats: GenerationStats) -> MismatchEvent:
    """Have a width policy draft no more, if it does that; note the alarm in the statistics."""
    stats.mismatch = alarm.message
    return attrs.evolve(alarm, parked=isinstance(width, Parkable) and width.park())
