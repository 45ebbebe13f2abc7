"""What cycles cost on a machine, as numbers."""

from __future__ import annotations

from typing import Any

import attrs

__all__ = ["CycleCosts"]


@attrs.frozen
class CycleCosts:
    """Seconds that a cycle takes, from one read to the next.

    Attributes:
        plain: without draft tokens, one after the other.
        widths: (draft tokens, seconds), by rising number; at least one.
        slots: what it takes besides to draft all the tokens that the drafter can, and verify as
            few as the first of `widths`; None where the drafter has no most, or it is that.
        measured: when, as ISO date and time in UTC.
        alone: whether only the numbers of `widths` are worth choosing, since a cycle of any other
            would have to be traced first.
    """

    plain: float
    widths: tuple[tuple[int, float], ...]
    slots: float | None = None
    measured: str = ""
    alone: bool = False

    def choices(self, most: int) -> list[int]:
        """Numbers of draft tokens, 1 to `most`, that are worth choosing."""
        if not self.alone:
            return list(range(1, most + 1))
        return [width for width, _ in self.widths if width <= most] or [most]

    def at(self, width: int) -> float:
        """Seconds at a width >= 1: on lines between what was measured, and past it."""
        points = self.widths
        if len(points) == 1:
            # One point and a plain cycle: a line through both.
            points = ((0, self.plain), *points)
        after = next((i for i, (w, _) in enumerate(points) if w >= width), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(after, 1) - 1], points[max(after, 1)]
        line = y0 + (y1 - y0) * (width - x0) / (x1 - x0)
        return max(line, min(y0, y1) * 0.5)

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "plain": self.plain,
            "widths": [list(point) for point in self.widths],
            "slots": self.slots,
            "measured": self.measured,
            "alone": self.alone,
        }

    @classmethod
    def of(cls, data: Any) -> CycleCosts:
        """Read what `as_data` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            widths = tuple((int(w), float(s)) for w, s in data["widths"])
            slots = None if data["slots"] is None else float(data["slots"])
            stamp, alone = str(data["measured"]), bool(data["alone"])
            costs = cls(float(data["plain"]), widths, slots, stamp, alone)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no costs: {error}") from error
        rising = [w for w, _ in widths] == sorted({w for w, _ in widths})
        if not widths or not rising or widths[0][0] < 1 or min(s for _, s in widths) <= 0:
            raise ValueError("no costs: widths and seconds out of order")
        if costs.plain <= 0:
            raise ValueError("no costs: a plain cycle takes no time")
        return costs
