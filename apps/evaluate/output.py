"""A judgement as tables and as a page."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console

from draftloom.apps.bench.charts import Bar, bar_plot
from draftloom.apps.bench.html import render_html, render_table
from draftloom.apps.bench.table import print_head, print_table

from .judge import LOOPING

__all__ = ["judgement_html", "print_judgement"]

Report = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _tables(report: Report) -> list[Table]:
    entries = report["drafters"]
    headers = ["drafter", "tau", "tau, no loops", "texts", "first slot", "x alone", "same text"]
    rows = []
    for entry in entries:
        first = entry["by_position"][0] if entry["by_position"] else None
        rows.append(
            [
                entry["variant"] + (" (gave up)" if entry["fell_back"] else ""),
                _number(entry["tau"]),
                _number(entry["tau_varied"]),
                f"{entry['varied']} of {entry['prompts']}",
                _number(first, ".0%"),
                _number(entry["speed_up"]),
                f"{entry['same_text']}/{entry['compared']}",
            ]
        )
    tables: list[Table] = [("acceptance length, and speed against the target alone", headers, rows)]
    types = list(dict.fromkeys(t for entry in entries for t in entry["by_type"]))
    names = [entry["variant"] for entry in entries]
    rows = []
    for kind in types:
        of_type = [entry["by_type"].get(kind) for entry in entries]
        known = next(found for found in of_type if found)
        cells = [_number(found["tau"] if found else None) for found in of_type]
        rows.append([kind, str(known["prompts"]), f"{known['repeated']:.2f}", *cells])
    tables.append(("tau by content type", ["content", "prompts", "repeated", *names], rows))
    count = max((len(entry["by_position"]) for entry in entries), default=0)
    rows = [
        [e["variant"], *(f"{rate:.0%}" for rate in e["by_position"])]
        + ["-"] * (count - len(e["by_position"]))
        for e in entries
    ]
    headers = ["drafter", *(str(i) for i in range(1, count + 1))]
    tables.append(("accepted, by draft position", headers, rows))
    return tables


def _note() -> str:
    return (
        "repeated: share of the text's 8-grams that had been there before, mean of the texts; a "
        f"text loops from {LOOPING:g} on"
    )


def print_judgement(report: Report, console: Console) -> None:
    """Print the tables."""
    print_head(report, console)
    for table in _tables(report):
        print_table(*table, console)
    console.print(f"\n{_note()}", markup=False, soft_wrap=True)


def judgement_html(report: Report) -> str:
    """One page without network or script: the judgement, then what a benchmark's page shows."""
    sections = [f'<p class="simulated">{escape(text)}</p>' for text in report["warnings"]]
    bars = [
        Bar(kind, entry["variant"], found["tau"], found["tau"], found["tau"])
        for entry in report["drafters"]
        for kind, found in entry["by_type"].items()
        if found["tau"] is not None
    ]
    if bars:
        sections += ["<h2>Acceptance length by content type</h2>", bar_plot("tau", bars)]
    for title, headers, rows in _tables(report)[:2]:
        sections += [f"<h2>{escape(title.capitalize())}</h2>", render_table(headers, rows)]
    sections.append(f'<p class="note">{escape(_note())}</p>')
    return render_html(report, title=f"draftloom eval: {report['target']}", sections=sections)
