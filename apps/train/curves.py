"""The log of a run as curves: one page, without network or script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from draftloom.apps.bench.charts import Line, line_plot
from draftloom.apps.bench.html import render_page

__all__ = ["curves_html", "read_log"]

POINTS = 120
"""Of a line at most; of a longer log, every so many records are taken together."""


def read_log(file: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line that a killed run left cut is dropped."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _line(name: str, points: Sequence[tuple[float, float]], colour: int) -> Line:
    """At most `POINTS` points: means of neighbours."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = ((group[-1][0], sum(value for _, value in group) / len(group)) for group in groups)
    return Line(name, tuple(means), colour)


def curves_html(title: str, records: Sequence[dict[str, Any]]) -> str:
    """The page: loss, right slots and speed over the steps, and tau on what is held out."""
    steps = [r for r in records if r["kind"] == "step"]
    held_out = [r for r in records if r["kind"] == "held-out"]
    parts = [f"<h1>{escape(title)}</h1>"]

    def plot(name: str, lines: list[Line], form: str) -> None:
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(line_plot(name, lines, lambda value: format(value, form)))

    if steps:
        plot("Loss by step", [_line("loss", [(r["step"], r["loss"]) for r in steps], 0)], ".3g")
        slots = len(steps[0]["right_by_position"])
        shown = sorted({0, slots // 2, slots - 1})
        lines = [
            _line(f"slot {k + 1}", [(r["step"], r["right_by_position"][k]) for r in steps], place)
            for place, k in enumerate(shown)
        ]
        plot("Right in training, by slot", lines, ".0%")
        speed = [(r["step"], r["tokens_per_second"]) for r in steps]
        plot("Tokens a second", [_line("tokens a second", speed, 0)], "g")
    if held_out:
        # A plot's x begins at 1: the measurement before the first step stands there.
        tau = [(max(1, r["step"]), r["tau"]) for r in held_out]
        plot("Acceptance length on held-out prompts", [_line("tau", tau, 2)], ".3g")
        last = [(i, share) for i, share in enumerate(held_out[-1]["by_position"], 1)]
        if last:
            plot(
                "Accepted, by draft position, at the end", [Line("accepted", tuple(last), 2)], ".0%"
            )
    return render_page(title, parts)
