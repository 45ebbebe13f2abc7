"""Two reports side by side: how much faster or slower the second one is, with the spread."""

from __future__ import annotations

from typing import Any

import attrs

from draftloom.errors import UsageError

__all__ = ["Comparison", "compare_reports", "differences"]


@attrs.frozen
class Comparison:
    """One variant at one length in both reports.

    Attributes:
        variant, suite, length: which.
        before, after: decoded tokens a second, medians.
        ratio: after / before.
        low, high: the least and the most that the ranges of both allow.
        certain: whether all of that range is on one side of 1.
    """

    variant: str
    suite: str
    length: int
    before: float
    after: float
    ratio: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the repeats of the two reports do not overlap."""
        return self.low > 1 or self.high < 1


def compare_reports(before: dict[str, Any], after: dict[str, Any]) -> list[Comparison]:
    """What both reports have, in the order of the second.

    Raises:
        UsageError: they have nothing in common, or only one is simulated.
    """
    if (before["simulated"] is None) != (after["simulated"] is None):
        raise UsageError("one report is simulated, the other is not", "compare like with like")
    known = {(e["variant"], e["suite"], e["length"]): e for e in before["summary"]}
    found = []
    for entry in after["summary"]:
        key = (entry["variant"], entry["suite"], entry["length"])
        if key not in known:
            continue
        old, new = known[key]["decode"], entry["decode"]
        if not min(old["low"], old["median"], new["median"]) > 0:
            continue
        ratio = new["median"] / old["median"]
        found.append(
            Comparison(
                *key,
                before=old["median"],
                after=new["median"],
                ratio=ratio,
                low=new["low"] / old["high"],
                high=new["high"] / old["low"],
            )
        )
    if not found:
        raise UsageError(
            "the reports have no variant and length in common", "run both with the same options"
        )
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What was not the same when the two were made, one line each."""
    lines = []
    for part in ("machine", "versions", "settings"):
        for key in sorted({*before[part], *after[part]}):
            old, new = before[part].get(key), after[part].get(key)
            if old != new:
                lines.append(f"{part}: {key} was {_shown(old)}, is {_shown(new)}")
    lines += [
        f"{key} was {before.get(key)}, is {after.get(key)}"
        for key in ("target", "simulated")
        if before.get(key) != after.get(key)
    ]
    return lines


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
