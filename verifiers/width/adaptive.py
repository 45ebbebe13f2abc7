"""Adaptive width: as many draft tokens as pay here and now, down to none.

What a cycle costs was measured beforehand on this machine (`draftloom.calibration`) and is scaled
by what cycles take as the text grows; without such a measurement it is learned from the cycles:
wall seconds of plain ones, and a line through the seconds of speculative ones over their width.
What a cycle brings is learned in any case: the share of accepted tokens at each position among the
cycles that got so far. The width with the most expected tokens a second is taken; where no width
beats plain decoding the drafter is parked, and asked again from time to time within a small share
of the time spent, a tenth of it where even a perfect drafter could not pay.
"""

from __future__ import annotations

from typing import Literal, get_args

import attrs

from draftloom.contracts import ComponentInfo, Width
from draftloom.costs import CycleCosts

__all__ = ["AdaptiveWidth"]

FIRST_WIDTHS = (2, 6)
"""Widths of the first speculative cycles: two points for the line."""
PRIOR, PRIOR_WEIGHT = 0.7, 2.0
"""Acceptance rate assumed of a position before it was seen, and how many cycles that counts."""
FREE = 0.03
"""Share of a cycle that drafting more than is verified may cost."""
HOPELESS = 10
"""So many times rarer a drafter is asked where even a perfect one could not pay."""
STALL, STALLS = 3, 3
"""A cycle that takes so many times longer than expected says nothing, so many times in a row."""
MARGIN = 1.02
"""Speculation must promise this much more than plain decoding."""


@attrs.define
class _Line:
    """Least squares of seconds over width, old cycles fading.

    Attributes:
        decay: weight that a cycle keeps with each one after it.
    """

    decay: float
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, width: float, seconds: float) -> None:
        expected = self.at(width)
        if expected is not None:  # one stall of the machine is not the price of a width
            seconds = min(seconds, STALL * expected)
        for name, value in (
            ("weight", 1.0),
            ("x", width),
            ("y", seconds),
            ("xx", width * width),
            ("xy", width * seconds),
        ):
            setattr(self, name, getattr(self, name) * self.decay + value)

    def at(self, width: float) -> float | None:
        """Seconds at a width; None before anything was seen."""
        if not self.weight:
            return None
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - mean_x * mean_x
        slope = (self.xy / self.weight - mean_x * mean_y) / variance if variance > 1e-6 else 0.0
        slope = max(slope, 0.0)
        return max(mean_y + slope * (width - mean_x), mean_y * 0.1)


@attrs.define
class _Scale:
    """How much longer cycles take now than they were measured to take: a fading mean. A few cycles
    in a row that take far longer are none: they are traced, or the machine stalls.

    Attributes:
        decay: weight that a cycle keeps with each one after it.
        stalls: cycles in a row that were left out.
    """

    decay: float
    weight: float = 1.0
    total: float = 1.0
    stalls: int = 0

    def add(self, expected: float, seconds: float) -> None:
        ratio = seconds / expected
        if ratio > STALL * self.value and self.stalls < STALLS:
            self.stalls += 1
            return
        self.stalls, ratio = 0, min(ratio, STALL * self.value)
        self.weight = self.weight * self.decay + 1
        self.total = self.total * self.decay + ratio

    @property
    def value(self) -> float:
        return self.total / self.weight


Calibrate = Literal["cached", "fresh", "off"]


class AdaptiveWidth:
    """Learns acceptance from the cycles themselves, and costs too where nobody measured them.

    Args:
        tokens: the widest draft it may choose; None is the drafter's most (16 without one).
        probe_share: share of the time that asking a parked drafter may take, 0..1.
        memory: cycles after which a cycle counts about a third.
        park: draft no more, not even to ask, once the mismatch alarm has rung.
        calibrate: ``cached``: costs are measured once for a model and machine, in a few seconds
            before the first text, and kept in a file; ``fresh``: measured in any case; ``off``.

    Raises:
        ValueError: an option out of range.
    """

    info = ComponentInfo("adaptive", "as many tokens as pay, down to plain decoding")

    def __init__(
        self,
        tokens: int | None = None,
        probe_share: float = 0.02,
        memory: int = 32,
        park: bool = True,
        calibrate: Calibrate = "cached",
    ) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if not 0 <= probe_share < 1:
            raise ValueError(f"probe_share must be in [0, 1), got {probe_share}")
        if memory < 1:
            raise ValueError(f"memory must be at least 1 cycle, got {memory}")
        if calibrate not in get_args(Calibrate):
            raise ValueError(
                f"calibrate must be one of {', '.join(get_args(Calibrate))}, got {calibrate!r}"
            )
        self.calibrate: str = calibrate
        self._costs: CycleCosts | None = None
        self._decay = 1 - 1 / memory
        self._plain_scale = _Scale(self._decay)
        self._width_scale = _Scale(self._decay)
        self._last = Width(0, 0)
        self._most = tokens
        self._probe_share = probe_share
        self._plain = _Line(self._decay)
        self._speculative = _Line(self._decay)
        self._explored = 0
        self._reached: list[float] = []
        self._accepted: list[float] = []
        self._budget = 0.0
        self._parks = park
        self._parked = False

    def take_costs(self, costs: CycleCosts) -> None:
        """What cycles take here, measured beforehand."""
        self._costs = costs

    def report(self) -> str:
        """What it chooses now, and why: one line."""
        plain, verify = self._plain_seconds(), self._last.verify
        if plain is None:
            return ""
        choice = f"{verify} draft tokens" if verify else "no draft tokens"
        parts = [f"a plain cycle takes {1e3 * plain:.1f} ms"]
        tried = verify or self._best(max(1, len(self._reached)))[0]
        seconds = self._seconds(tried)
        if seconds is not None and self._explored:
            shares = ", ".join(f"{self.acceptance(i):.0%}" for i in range(min(tried, 4)))
            parts.append(f"one of {tried} {1e3 * seconds:.1f} ms")
            parts.append(f"accepted by position {shares}")
        known = "measured" if self._costs else "learned"
        return f"{choice} ({known}: {'; '.join(parts)})"

    def _plain_seconds(self) -> float | None:
        if self._costs is not None:
            return self._costs.plain * self._plain_scale.value
        return self._plain.at(0)

    def _seconds(self, width: int) -> float | None:
        if self._costs is not None:
            return self._costs.at(width) * self._width_scale.value
        return self._speculative.at(width)

    def park(self) -> bool:
        """Draft no more, unless that is not wanted. Whether it drafts no more."""
        self._parked = self._parks
        return self._parks

    def choose(self, limit: int) -> Width:
        """The widths of the next cycle."""
        self._last = self._choose(limit)
        return self._last

    def _choose(self, limit: int) -> Width:
        most = min(limit, 16 if self._most is None and limit > 64 else self._most or limit)
        plain = self._plain_seconds()
        if plain is None or most < 1 or self._parked:
            return Width(0, 0)
        if self._costs is None and self._explored < len(FIRST_WIDTHS):
            return self._width(FIRST_WIDTHS[self._explored], most)
        best, rate = self._best(most)
        if rate > MARGIN / plain:
            return self._width(best, most)
        cost = (self._seconds(best) or 0.0) - plain
        if not self._could_pay(most, plain):
            cost *= HOPELESS
        if self._budget > cost > 0:
            self._budget = 0.0
            return self._width(best, most)
        return Width(0, 0)

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        """Learn the price and the yield of a cycle."""
        self._budget += self._probe_share * seconds
        if not verified:
            self._plain.add(0, seconds)
            if self._costs is not None:
                self._plain_scale.add(self._costs.plain, seconds)
            return
        self._explored += 1
        self._speculative.add(verified, seconds)
        if self._costs is not None:
            self._width_scale.add(self._costs.at(verified), seconds)
        for counts in (self._reached, self._accepted):
            counts.extend([0.0] * (verified - len(counts)))
        for i in range(min(accepted + 1, verified)):
            self._reached[i] = self._reached[i] * self._decay + 1
            self._accepted[i] = self._accepted[i] * self._decay + (i < accepted)

    def acceptance(self, position: int) -> float:
        """Estimated share of accepted tokens at a position among the cycles that reach it."""
        known = min(position, len(self._reached) - 1)
        if known < 0:
            return PRIOR
        reached, accepted = self._reached[known], self._accepted[known]
        return (accepted + PRIOR * PRIOR_WEIGHT) / (reached + PRIOR_WEIGHT)

    def _best(self, most: int) -> tuple[int, float]:
        """The width in 1..most with the most expected tokens a second, and that rate."""
        choices = self._choices(most)
        best, best_rate, survives, tokens = choices[0], 0.0, 1.0, 1.0
        for width in range(1, most + 1):
            survives *= self.acceptance(width - 1)
            tokens += survives
            if width not in choices:
                continue
            rate = tokens / (self._seconds(width) or float("inf"))
            if rate > best_rate:
                best, best_rate = width, rate
        return best, best_rate

    def _choices(self, most: int) -> list[int]:
        return list(range(1, most + 1)) if self._costs is None else self._costs.choices(most)

    def _could_pay(self, most: int, plain: float) -> bool:
        """Whether any width would pay if every draft token were accepted."""
        return any((w + 1) * plain > (self._seconds(w) or 0.0) for w in self._choices(most))

    def _width(self, verify: int, most: int) -> Width:
        """All slots where they cost next to nothing: the first of many are better than few."""
        verify, costs = min(verify, most), self._costs
        slots = None if costs is None or self._most is not None else costs.slots
        if costs is not None and slots is not None and slots <= FREE * costs.at(verify):
            return Width(most, verify)
        return Width(verify, verify)
