"""Plots as inline SVG, drawn here: nothing is loaded and nothing runs when a page is opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

__all__ = ["COLOURS", "Bar", "Line", "bar_plot", "line_plot", "ratio_plot", "stacked_plot"]

COLOURS = ("#4269d0", "#d9822b", "#2a9d6f", "#b5487a", "#7a5cc0", "#8a6d3b", "#3aa0b8", "#888888")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 280, 56, 34, 14


@attrs.frozen
class Line:
    """A series of points.

    Attributes:
        name: in the legend.
        points: (x, y).
        colour: index of its colour, so that a variant has one colour in all plots.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int


@attrs.frozen
class Bar:
    """A bar with its range.

    Attributes:
        group: under which it stands.
        name: in the legend.
        value, low, high: height, and the ends of the range.
    """

    group: str
    name: str
    value: float
    low: float
    high: float


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _ticks(top: float) -> list[float]:
    """Four to eight round values from 0 to above `top`."""
    if not (math.isfinite(top) and top > 0):
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(top))
    for part in (0.2, 0.5, 1.0, 2.0):
        if top / (step * part) <= 7:
            step *= part
            break
    return [i * step for i in range(math.ceil(top / step) + 1)]


def _svg(title: str, body: Sequence[str], height: int = HEIGHT) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(ticks: Sequence[float], label: Callable[[float], str]) -> tuple[list[str], float]:
    """Grid lines with labels, and pixels a unit."""
    scale = (HEIGHT - BOTTOM - TOP) / ticks[-1]
    body = []
    for tick in ticks:
        y = HEIGHT - BOTTOM - tick * scale
        body.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}"/>')
        body.append(_text(LEFT - 6, y + 4, label(tick), "end"))
    return body, scale


def bar_plot(title: str, bars: Sequence[Bar]) -> str:
    """Bars in groups, each with the range of its repeats."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    names = list(dict.fromkeys(bar.name for bar in bars))
    body, scale = _frame(_ticks(max(bar.high for bar in bars)), lambda tick: f"{tick:g}")
    slot = (WIDTH - LEFT) / len(groups)
    wide = slot * 0.8 / len(names)
    base = HEIGHT - BOTTOM
    for place, group in enumerate(groups):
        begin = LEFT + place * slot + slot * 0.1
        body.append(_text(begin + slot * 0.4, HEIGHT - 12, group))
        for bar in (bar for bar in bars if bar.group == group):
            index = names.index(bar.name)
            x, tall = begin + index * wide, max(bar.value * scale, 0.5)
            middle = x + wide / 2
            note = f"{bar.name}, {bar.group}: {bar.value:.1f} ({bar.low:.1f} to {bar.high:.1f})"
            body.append(
                f'<rect class="mark" x="{x + 1:.1f}" y="{base - tall:.1f}" '
                f'width="{max(wide - 2, 1):.1f}" height="{tall:.1f}" fill="{_colour(index)}">'
                f"<title>{escape(note)}</title></rect>"
                f'<line class="range" x1="{middle:.1f}" x2="{middle:.1f}" '
                f'y1="{base - bar.low * scale:.1f}" y2="{base - bar.high * scale:.1f}"/>'
            )
    return _svg(title, body) + legend(names)


def line_plot(title: str, lines: Sequence[Line], label: Callable[[float], str]) -> str:
    """Lines over whole x from 1, y from 0."""
    top = max(y for line in lines for _, y in line.points)
    last = max(x for line in lines for x, _ in line.points)
    body, scale = _frame(_ticks(top), label)
    step = (WIDTH - LEFT - 30) / max(last - 1, 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + 15 + (x - 1) * step, HEIGHT - BOTTOM - y * scale

    every = max(1, round(last / 16))
    for tick in range(1, int(last) + 1, every):
        body.append(_text(at(tick, 0)[0], HEIGHT - 12, str(tick)))
    for line in lines:
        points = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        colour = _colour(line.colour)
        body.append(f'<polyline class="line" points="{path}" stroke="{colour}"/>')
        for (x, y), (px, py) in zip(line.points, points, strict=True):
            note = f"{line.name}, {x:g}: {label(y)}"
            body.append(
                f'<circle class="mark" cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}">'
                f"<title>{escape(note)}</title></circle>"
            )
    return _svg(title, body) + legend(
        [line.name for line in lines], [line.colour for line in lines]
    )


def ratio_plot(title: str, rows: Sequence[Bar]) -> str:
    """One line a row: a dot at the ratio and its range, beside a line at 1."""
    row_height, left, right = 26, 250, 70
    low = min([1.0, *(row.low for row in rows)])
    high = max([1.0, *(row.high for row in rows)])
    margin = 0.05 * (high - low) or 0.05
    scale = (WIDTH - left - right) / (high - low + 2 * margin)

    def at(ratio: float) -> float:
        return left + (ratio - low + margin) * scale

    height = 2 * TOP + len(rows) * row_height + 16
    body = [
        f'<line class="grid" x1="{at(1):.1f}" x2="{at(1):.1f}" y1="{TOP}" y2="{height - 28}"/>',
        _text(at(1), height - 12, "1"),
    ]
    for place, row in enumerate(rows):
        y = TOP + (place + 0.5) * row_height
        note = f"{row.name}: {row.value:.3f} ({row.low:.3f} to {row.high:.3f})"
        body.append(_text(left - 10, y + 4, row.name, "end"))
        body.append(
            f'<line class="range" x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body.append(
            f'<circle class="mark" cx="{at(row.value):.1f}" cy="{y:.1f}" r="4" '
            f'fill="{_colour(0 if row.value >= 1 else 1)}"><title>{escape(note)}</title></circle>'
        )
        body.append(_text(WIDTH - right + 10, y + 4, f"{row.value:.3f}", "start"))
    return _svg(title, body, height)


def stacked_plot(title: str, parts: Sequence[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    """One horizontal bar a row, of the parts in order; the sum is written behind it."""
    row_height, left = 30, 190
    top = max(sum(values) for _, values in rows)
    scale = (WIDTH - left - 80) / top if top > 0 else 0.0
    body = []
    for place, (name, values) in enumerate(rows):
        y, x = float(TOP + place * row_height), float(left)
        body.append(_text(left - 8, y + 15, name, "end"))
        for index, value in enumerate(values):
            wide = max(value * scale, 0.2)
            note = f"{name}, {parts[index]}: {value:.3f}"
            body.append(
                f'<rect class="mark" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="20" '
                f'fill="{_colour(index)}"><title>{escape(note)}</title></rect>'
            )
            x += wide
        body.append(_text(x + 6, y + 15, f"{sum(values):.2f}", "start"))
    return _svg(title, body, 2 * TOP + len(rows) * row_height) + legend(parts)


def legend(names: Sequence[str], colours: Sequence[int] | None = None) -> str:
    """What the colours mean; by default they are taken in order."""
    items = "".join(
        f'<li><span style="background:{_colour(i)}"></span>{escape(name)}</li>'
        for i, name in zip(colours or range(len(names)), names, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'
