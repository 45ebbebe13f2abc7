"""Does acceptance decay over a long text? tau by window of tokens, in several compute types.

What drifts in bfloat16 (a recurrent state, its replay, gates, the drafter's features) shows as a
tau that falls along the text where that of float32 does not. Texts of different types are different
texts; how much of a window repeats what was there before is given beside it, since a text that
loops is easy to draft.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from html import escape

import attrs
import mlx.core as mx

from draftloom.builder import PipelineBuilder
from draftloom.errors import UsageError

from .charts import Line, line_plot
from .html import render_facts, render_page, render_table
from .measure import Run, Settings, check_room, encode_prompts, measure
from .prompts import BenchPrompt, EncodedPrompt
from .report import Report, head, spread
from .subjects import Subject, load_subject, steady

__all__ = [
    "LENGTH",
    "render_stability",
    "run_stability",
    "stability_table",
    "types_of",
    "windows_of",
]

LENGTH = 8192
"""Tokens of a text where nobody says."""


def run_stability(
    builder: PipelineBuilder,
    types: Sequence[str],
    prompts: Sequence[BenchPrompt],
    settings: Settings,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Write every prompt's text in every type, one type after the other.

    Args:
        builder: the pipeline; a width that nobody chose is the drafter's own.
        types: compute types, the one to compare with first.
        prompts: at least one.
        settings: without lengths, a text has `LENGTH` tokens, or as many as the target's context
            holds; else the longest one counts.
        progress: told what runs next.

    Returns:
        A report: JSON data.

    Raises:
        UsageError: a type twice, a pipeline that drafts nothing, or no room for a text.
        ModelError, GraphError: the pipeline cannot be built.
    """
    if len(set(types)) < len(types):
        raise UsageError(f"a type is given twice: {', '.join(types)}")
    if builder.check().names["drafter"] == "none":
        raise UsageError("the pipeline drafts nothing", "name a drafter")
    runs: list[Run] = []
    variants: list[Report] = []
    report: Report = {}
    for dtype in types:
        progress(f"{dtype}, loading the target")
        subject = load_subject([(dtype, steady(builder.dtype(dtype)))])
        encoded = encode_prompts(subject, prompts)
        settings = _with_length(settings, subject, encoded)
        check_room(subject, settings, encoded)
        only = attrs.evolve(subject, variants=subject.variants[-1:])
        runs += measure(only, settings, encoded, progress).runs
        variants += [{"name": v.name, "parts": v.parts} for v in only.variants]
        report = report or head(subject, settings)
        del subject, only  # the next type's weights need the room
        gc.collect()
        mx.clear_cache()
    report |= {"variants": variants, "runs": [attrs.asdict(run) for run in runs], "summary": []}
    report = json.loads(json.dumps(report))  # what a reader of the file gets
    report["stability"] = windows_of(report)
    return report


def _with_length(
    settings: Settings, subject: Subject, prompts: Sequence[EncodedPrompt]
) -> Settings:
    """One length, which fits where none was asked for; no more repeats than one: greedy texts are
    the same in each."""
    if settings.lengths:
        return attrs.evolve(settings, lengths=settings.lengths[-1:], repeats=1)
    longest = max(len(prompt.ids) for prompt in prompts)
    room = LENGTH if subject.context_limit is None else subject.context_limit - longest
    return attrs.evolve(settings, lengths=(max(2, min(LENGTH, room)),), repeats=1)


def windows_of(report: Report) -> list[Report]:
    """One entry a type: tau, its range over the prompts, and the repeated share, by window; and
    tau of the second half of the windows over that of the first."""
    entries = []
    for variant in report["variants"]:
        own = [run for run in report["runs"] if run["variant"] == variant["name"]]
        windows = []
        for place in range(max((len(run["windows"]) for run in own), default=0)):
            there = [run for run in own if len(run["windows"]) > place and run["windows"][place][0]]
            counts = [run["windows"][place] for run in there]
            if not counts:
                continue
            each = spread([1 + accepted / cycles for cycles, accepted in counts])
            shares = [_at(run["repeated_by_window"], place) for run in there]
            windows.append(
                {
                    "window": place,
                    "tau": _tau(counts),
                    "low": each.low,
                    "high": each.high,
                    "cycles": sum(cycles for cycles, _ in counts),
                    "repeated": sum(shares) / len(shares),
                    "texts": len(there),
                }
            )
        entries.append({"type": variant["name"], "windows": windows, "kept": _kept(own)})
    return entries


def _at(values: Sequence[float], place: int) -> float:
    return values[place] if place < len(values) else 0.0


def _tau(counts: Sequence[Sequence[int]]) -> float:
    return 1 + sum(accepted for _, accepted in counts) / sum(cycles for cycles, _ in counts)


def _kept(runs: Sequence[Report]) -> float | None:
    """tau of the second half of the windows over that of the first; None below two windows."""
    count = max((len(run["windows"]) for run in runs), default=0)
    halves = [
        [window for run in runs for window in part(run["windows"]) if window[0]]
        for part in (lambda w: w[: count // 2], lambda w: w[count - count // 2 :])
    ]
    return _tau(halves[1]) / _tau(halves[0]) if all(halves) else None


def stability_table(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """tau by window: a row a window, and how much of tau the second half of the texts keeps."""
    size, entries = report["settings"]["window"], report["stability"]
    headers = ["tokens"]
    for entry in entries:
        headers += [entry["type"], "range", "repeated"]
    rows = []
    for place in range(max((len(e["windows"]) for e in entries), default=0)):
        row = [f"{place * size}-{(place + 1) * size - 1}"]
        for entry in entries:
            found = next((w for w in entry["windows"] if w["window"] == place), None)
            row += ["-"] * 3 if found is None else _cells(found)
        rows.append(row)
    kept = ["second half / first"]
    for entry in entries:
        kept += ["-" if entry["kept"] is None else f"{entry['kept']:.3f}", "", ""]
    title = f"tau by {size} tokens of the text, its range over the prompts, share that repeats"
    return title, headers, [*rows, kept]


def _cells(window: Report) -> list[str]:
    spans = f"{window['low']:.2f}-{window['high']:.2f}"
    return [f"{window['tau']:.2f}", spans, f"{window['repeated']:.0%}"]


def render_stability(report: Report) -> str:
    """The report as one HTML page, which loads and runs nothing."""
    title = f"draftloom bench stability: {report['target']}"
    lines, shares = (
        [
            Line(e["type"], tuple((w["window"] + 1, w[key]) for w in e["windows"]), index)
            for index, e in enumerate(report["stability"])
            if e["windows"]
        ]
        for key in ("tau", "repeated")
    )
    name, headers, rows = stability_table(report)
    size = report["settings"]["window"]
    parts = [f"<h1>{escape(title)}</h1>", render_facts(report)]
    if lines:
        parts += [
            "<h2>Acceptance length over the text</h2>",
            line_plot("acceptance length over the text", lines, lambda tau: f"{tau:.3g}"),
            f'<p class="note">tau in the first, second, ... {size} tokens of the texts.</p>',
            "<h2>Share that repeats</h2>",
            line_plot("share that repeats", shares, lambda share: f"{share:.0%}"),
            '<p class="note">Runs of 8 tokens that were there before: a text that loops is easy '
            "to draft.</p>",
        ]
    return render_page(title, [*parts, f"<h2>{escape(name)}</h2>", render_table(headers, rows)])


def types_of(text: str) -> tuple[str, ...]:
    """Read ``float32,bfloat16``.

    Raises:
        UsageError: an empty name.
    """
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise UsageError(f"--types cannot be read: {text!r}", "as in float32,bfloat16")
    return found
