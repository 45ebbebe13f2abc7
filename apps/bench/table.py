"""A report on the terminal; plain lines where stdout is none. Simulated reports say so a line."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .stages import STAGES

__all__ = ["print_head", "print_report", "print_table", "worth_tables"]

GIB = 2**30


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print all tables of a report."""
    tag = "simulated: " if report["simulated"] else ""
    print_head(report, console)
    for title, headers, rows in _tables(report):
        print_table(title, headers, rows, console, tag)


def print_head(report: dict[str, Any], console: Console) -> None:
    """Print what ran, on what and how."""
    tag = "simulated: " if report["simulated"] else ""
    for line in _head(report):
        console.print(f"{tag}{line}", markup=False, soft_wrap=True)


def print_table(
    title: str, headers: list[str], rows: list[list[str]], console: Console, tag: str = ""
) -> None:
    """Print a table under its title; `tag` begins every plain line."""
    console.print(f"\n{tag}{title}", markup=False, soft_wrap=True)
    if not console.is_terminal:
        _print_plain(tag, headers, rows, console)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _print_plain(tag: str, headers: list[str], rows: list[list[str]], console: Console) -> None:
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, *rows]:
        cells = [
            cell.ljust(width) if i < 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(f"{tag}{'  '.join(cells)}".rstrip(), markup=False, soft_wrap=True)


def _head(report: dict[str, Any]) -> list[str]:
    device, versions = report["machine"], report["versions"]
    settings = report["settings"]
    prompts = len({run["prompt"] for run in report["runs"]})
    ends = "ended by the model" if settings["stop_at_eos"] else "end-of-sequence ignored"
    lines = [
        f"target {report['target']} on {device['device']} ({device['backend']}), "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"{prompts} prompts, {settings['repeats']} repeats in turns, greedy, {ends}, "
        f"cool-down {settings['cool_down']:g} s",
    ]
    if report["simulated"]:
        rates = ", ".join(f"{rate:g}" for rate in report["simulated"]["rates"])
        lines.append(f"random weights; acceptance drawn with probability {rates}")
    return lines


def _tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = []
    for length in report["settings"]["lengths"]:
        entries = [e for e in report["summary"] if e["length"] == length]
        for suite in dict.fromkeys(e["suite"] for e in entries):
            own = [e for e in entries if e["suite"] == suite]
            title = f"{length} tokens, {'all prompts' if suite == 'all' else suite}"
            tables.append(_speed_table(title, own))
    positions = _position_table(report)
    if positions[2]:
        tables.append(positions)
    if report["stages"]:
        tables.append(_stage_table(report))
    if "ablation" in report:
        tables += worth_tables(report)
    return tables


def _speed_table(title: str, entries: list[dict[str, Any]]) -> Any:
    headers = ["variant", "tokens/s", "range", "x alone", "range", "prefill/s", "tau"]
    headers += ["peak GiB", "efficiency", "same text"]
    rows = []
    for entry in entries:
        decode, ratio = entry["decode"], entry["ratio"]
        name = entry["variant"] + (" (gave up)" if entry["fell_back"] else "")
        rows.append(
            [
                name,
                f"{decode['median']:.1f}",
                f"{decode['low']:.1f}-{decode['high']:.1f}",
                f"{ratio['median']:.2f}" if ratio else "-",
                f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
                f"{entry['prefill']['median']:.0f}",
                f"{entry['tau']:.2f}" if entry["tau"] else "-",
                f"{entry['peak_bytes'] / GIB:.2f}",
                f"{entry['efficiency']:.2f}" if entry["efficiency"] else "-",
                f"{entry['same']}/{entry['compared']}" if entry["compared"] else "-",
            ]
        )
    return title, headers, rows


def _position_table(report: dict[str, Any]) -> Any:
    longest = max(report["settings"]["lengths"])
    chosen = [e for e in report["summary"] if e["suite"] == "all" and e["length"] == longest]
    chosen = [e for e in chosen if e["by_position"]]
    count = max((len(e["by_position"]) for e in chosen), default=0)
    rows = []
    for entry in chosen:
        cells = [f"{rate:.0%}" for rate in entry["by_position"]]
        rows.append([entry["variant"], *cells, *["-"] * (count - len(cells))])
    title = f"accepted, by draft position, {longest} tokens"
    return title, ["variant", *(str(i) for i in range(1, count + 1))], rows


def worth_tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What each kernel switch is worth, a table a length."""
    headers = ["kernel switch", "tokens/s", "range", "prefill/s", "range", "same text", "verdict"]
    tables = []
    for length in report["settings"]["lengths"]:
        rows = []
        for entry in report["ablation"]["worth"]:
            if entry["length"] != length:
                continue
            cells = [entry["switch"]]
            for phase in ("decode", "prefill"):
                ratio = entry[phase]
                cells.append(f"{ratio['median']:.3f}")
                cells.append(f"{ratio['low']:.3f}-{ratio['high']:.3f}")
            same = f"{entry['same']}/{entry['compared']}" if entry["compared"] else "-"
            rows.append([*cells, same, entry["verdict"]])
        title = f"{length} tokens, what a kernel is worth: speed with it over speed without it"
        tables.append((title, headers, rows))
    return tables


def _stage_table(report: dict[str, Any]) -> Any:
    rows = []
    for entry in report["stages"]:
        cycles = max(entry["cycles"], 1)
        cells = [f"{1000 * entry['seconds'][stage] / cycles:.2f}" for stage in STAGES]
        rows.append([entry["variant"], *cells, str(entry["cycles"])])
    title = "milliseconds a cycle by stage, in a pass of its own that waits after every stage"
    return title, ["variant", *STAGES, "cycles"], rows
