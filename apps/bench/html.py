"""A report as one HTML page: no network, no script. Plots, tables, and texts coloured by origin."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .charts import Bar, Line, bar_plot, line_plot, ratio_plot, stacked_plot
from .measure import WINDOW
from .stages import STAGES
from .table import worth_tables

__all__ = ["render_facts", "render_html", "render_page", "render_table"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; } .simulated { background: #d9822b44; padding: .5rem 1rem; }
svg.plot { max-width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: var(--line); } .range { stroke: currentColor; stroke-width: 1.5; }
.line { fill: none; stroke-width: 2; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
ul.legend span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
pre.text { white-space: pre-wrap; border: 1px solid var(--line); padding: .7rem; }
.drafted { background: #2a9d6f40; } .corrected { background: #d0425a66; }
.bonus { background: #4269d066; } .plain, .first { background: var(--soft); }
p.note { opacity: .75; }
"""

ORIGINS = {
    "drafted": "drafted and accepted",
    "corrected": "the target's correction after a rejection",
    "bonus": "the target's bonus after a whole draft",
    "plain": "decoded without a draft",
    "first": "from the prompt's pass",
}
Report = dict[str, Any]


def render_html(report: Report, title: str = "", sections: Sequence[str] = ()) -> str:
    """The page of a report.

    Args:
        report: from `run_bench`.
        title: of the page; by default it names the target.
        sections: HTML to show before the benchmark's own plots.
    """
    simulated = report["simulated"]
    title = title or f"draftloom bench: {report['target']}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if simulated:
        rates = ", ".join(f"{rate:g}" for rate in simulated["rates"])
        parts.append(
            '<p class="simulated">Simulated: random weights, and acceptance drawn with '
            f"probability {escape(rates)} by position. Times are measured; the acceptance says "
            "nothing about any drafter.</p>"
        )
    parts.append(render_facts(report))
    parts += sections
    parts += _speed(report)
    parts += _positions(report)
    parts += _windows(report)
    parts += _stages(report)
    parts += _worth(report)
    parts += _texts(report)
    return render_page(title, parts)


def render_page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML parts, which may load and run nothing."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


def _heading(report: Report, text: str) -> str:
    return f"<h2>{escape(text)}{' (simulated)' if report['simulated'] else ''}</h2>"


def render_facts(report: Report) -> str:
    """What ran, on what and how, as an HTML table."""
    device, settings = report["machine"], report["settings"]
    facts = {
        "machine": f"{device['device']} ({device['backend']}), {device['system']}",
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "made": report["date"],
        "repeats": f"{settings['repeats']}, variants in turns, warm-up of "
        f"{settings['warm_up']} tokens apart, cool-down {settings['cool_down']:g} s",
        "texts": "greedy, " + ("ended by the model" if settings["stop_at_eos"] else "full length"),
    }
    for variant in report["variants"]:
        named = ", ".join(f"{k} {v}" for k, v in variant["parts"].items() if k != "target")
        facts[variant["name"]] = named or "plain mlx_lm.stream_generate on the same weights"
    rows = "".join(
        f'<tr><td>{escape(k)}</td><td style="text-align:left">{escape(str(v))}</td></tr>'
        for k, v in facts.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def render_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain text."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headers)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _speed(report: Report) -> list[str]:
    entries = [e for e in report["summary"] if e["suite"] == "all"]
    bars = [
        Bar(
            f"{e['length']} tokens",
            e["variant"],
            *(e["decode"][k] for k in ("median", "low", "high")),
        )
        for e in entries
    ]
    parts = [
        _heading(report, "Speed by length"),
        bar_plot("decoded tokens a second by length", bars),
        '<p class="note">Decoded tokens a second: median of the repeats, with their range. '
        "Prefill is apart.</p>",
    ]
    headers = ["variant", "tokens", "tokens/s", "x alone", "tau", "prefill/s", "peak GiB"]
    rows = []
    for entry in report["summary"]:
        suite = "" if entry["suite"] == "all" else f", {entry['suite']}"
        rows.append(
            [
                entry["variant"] + suite,
                str(entry["length"]),
                f"{entry['decode']['median']:.1f}",
                f"{entry['ratio']['median']:.2f}" if entry["ratio"] else "-",
                f"{entry['tau']:.2f}" if entry["tau"] else "-",
                f"{entry['prefill']['median']:.0f}",
                f"{entry['peak_bytes'] / 2**30:.2f}",
            ]
        )
    return [*parts, render_table(headers, rows)]


def _positions(report: Report) -> list[str]:
    longest = max(report["settings"]["lengths"])
    names = [variant["name"] for variant in report["variants"]]
    lines = [
        Line(e["variant"], tuple(enumerate(e["by_position"], 1)), names.index(e["variant"]))
        for e in report["summary"]
        if e["suite"] == "all" and e["length"] == longest and e["by_position"]
    ]
    if not lines:
        return []
    note = "Share of accepted draft tokens at each position, among the cycles that verified one."
    return [
        _heading(report, "Acceptance by position"),
        line_plot("acceptance by draft position", lines, lambda rate: f"{rate:.0%}"),
        f'<p class="note">{note}</p>',
    ]


def _windows(report: Report) -> list[str]:
    longest = max(report["settings"]["lengths"])
    names = [variant["name"] for variant in report["variants"]]
    lines = [
        Line(e["variant"], tuple(enumerate(e["by_window"], 1)), names.index(e["variant"]))
        for e in report["summary"]
        if e["suite"] == "all" and e["length"] == longest and len(e["by_window"]) > 1
    ]
    if not lines:
        return []
    window = report["settings"].get("window", WINDOW)
    return [
        _heading(report, "Acceptance length over the text"),
        line_plot("acceptance length over the text", lines, lambda tau: f"{tau:.3g}"),
        f'<p class="note">tau in the first, second, ... {window} tokens of the texts.</p>',
    ]


def _stages(report: Report) -> list[str]:
    if not report["stages"]:
        return []
    rows = []
    for entry in report["stages"]:
        cycles = max(entry["cycles"], 1)
        values = [1000 * entry["seconds"][stage] / cycles for stage in STAGES]
        rows.append((entry["variant"], values))
    efficiency = [
        f"{e['variant']} {e['efficiency']:.2f}" for e in report["summary"] if e["efficiency"]
    ]
    parts = [
        _heading(report, "Time by stage"),
        stacked_plot("milliseconds a cycle by stage", STAGES, rows),
        '<p class="note">Milliseconds a cycle, from a pass of its own that waits for the device '
        "after every stage; timed runs overlap them.</p>",
    ]
    if efficiency:
        parts.append(
            '<p class="note">Measured speed over the limit that draft and verify alone would '
            f"allow: {escape(', '.join(efficiency))}.</p>"
        )
    return parts


def _worth(report: Report) -> list[str]:
    if "ablation" not in report:
        return []
    parts = [_heading(report, "What each kernel is worth")]
    for title, headers, rows in worth_tables(report):
        length = int(title.split()[0])
        own = [e for e in report["ablation"]["worth"] if e["length"] == length]
        ranges = [
            Bar("", e["switch"], *(e["decode"][k] for k in ("median", "low", "high"))) for e in own
        ]
        parts.append(ratio_plot(f"what each kernel is worth, {length} tokens", ranges))
        parts.append(render_table(headers, rows))
    left_out = "; ".join(f"{name}: {why}" for name, why in report["ablation"]["left_out"])
    parts.append(
        '<p class="note">Speed with the kernel over speed without it, in the same repeat: above 1 '
        "it pays. Median and range of the repeats; the first row is the pipeline against "
        f"itself. Not measured: {escape(left_out) or 'nothing'}.</p>"
    )
    return parts


def _texts(report: Report) -> list[str]:
    if not report["texts"]:
        return []
    keys = "".join(
        f'<li><span class="{name}"></span>{escape(meaning)}</li>'
        for name, meaning in ORIGINS.items()
    )
    parts = [_heading(report, "Texts by origin of the token"), f'<ul class="legend">{keys}</ul>']
    for text in report["texts"]:
        spans = "".join(
            f'<span class="token {origin}" title="{origin}, cycle {cycle}">{escape(piece)}</span>'
            for piece, origin, cycle in text["pieces"]
        )
        parts.append(f'<h3>{escape(text["variant"])}</h3><pre class="text">{spans}</pre>')
    return parts
