"""From raw runs to medians, ratios, plots and comparisons; on a report made by hand."""

import copy
import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from draftloom.apps.bench.compare import compare_reports, differences
from draftloom.apps.bench.html import render_html
from draftloom.apps.bench.report import MLX_SETTINGS, machine, read_report, summarize
from draftloom.apps.bench.table import print_report
from draftloom.errors import UsageError


def run(variant: str, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("cycles", "drafted", "verified", "accepted"), 0)
    base = {
        "variant": variant, "suite": "code", "prompt": 0, "length": 11, "repeat": repeat,
        "order": 0, "prompt_tokens": 8, "tokens": 11, "prefill_seconds": 0.5,
        "decode_seconds": seconds, "peak_bytes": 2**30, "verified_by_position": [],
        "accepted_by_position": [], "windows": [], "fell_back": "", "same_tokens": None,
    }  # fmt: skip
    return {**base, **counts, **more}


def drafted(repeat: int, seconds: float) -> dict[str, Any]:
    return run(
        "dflash", repeat, seconds, cycles=4, drafted=12, verified=8, accepted=6,
        verified_by_position=[4, 4], accepted_by_position=[4, 2], same_tokens=True,
    )  # fmt: skip


def report(simulated: bool = False) -> dict[str, Any]:
    stages = {"draft": 0.1, "verify": 0.4, "accept": 0.0, "rollback": 0.1, "host": 0.1}
    made = {
        "format": 1,
        "simulated": {"shape": "tiny", "rates": [0.9, 0.5]} if simulated else None,
        "target": "a <model>",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"device": "chip", "backend": "cpu", "system": "Linux"},
        "versions": {"draftloom": "0", "mlx": "1", "mlx-lm": "2"},
        "settings": {
            "lengths": [11], "repeats": 3, "warm_up": 2, "cool_down": 0.0, "stop_at_eos": False
        },
        "variants": [{"name": "mlx-lm", "parts": {}}, {"name": "dflash", "parts": {"width": "3"}}],
        "runs": [
            *(run("mlx-lm", i, s) for i, s in enumerate((1.0, 2.0, 4.0))),
            *(drafted(i, s) for i, s in enumerate((0.5, 0.5, 4.0))),
        ],
        "stages": [
            {
                "variant": "dflash", "length": 11, "cycles": 4, "accepted": 6,
                "seconds": stages, "limits": [40.0, 10.0, 5.0],
            }
        ],
        "texts": [
            {
                "variant": "dflash",
                "pieces": [["<a", "first", 0], ["b", "drafted", 1], ["c", "bonus", 1]],
            }
        ],
    }  # fmt: skip
    return {**made, "summary": summarize(made)}


def entry(made: dict[str, Any], variant: str) -> dict[str, Any]:
    (found,) = (e for e in made["summary"] if e["variant"] == variant)
    return found


def test_speeds_are_medians_with_their_range() -> None:
    made = report()
    assert entry(made, "mlx-lm")["decode"] == {"median": 5.0, "low": 2.5, "high": 10.0}
    assert entry(made, "mlx-lm")["prefill"]["median"] == 16.0
    assert entry(made, "dflash")["decode"] == {"median": 20.0, "low": 2.5, "high": 20.0}


def test_ratios_pair_the_repeats() -> None:
    assert entry(report(), "dflash")["ratio"] == {"median": 2.0, "low": 1.0, "high": 4.0}


def test_acceptance_and_efficiency() -> None:
    found = entry(report(), "dflash")
    assert found["tau"] == 1 + 6 / 4
    assert found["acceptance_rate"] == 6 / 8
    assert found["by_position"] == [1.0, 0.5]
    assert found["limit"] == 10.0
    # 20 of 40 tokens a second, 20 of 10, 2.5 of 5: each repeat by the pass that followed it
    assert (found["efficiency"], found["efficiency_range"]) == (0.5, [0.5, 2.0])
    assert (found["same"], found["compared"]) == (3, 3)
    assert entry(report(), "mlx-lm")["efficiency"] is None


def test_no_efficiency_where_a_repeat_had_no_cycle() -> None:
    made = report()
    made["stages"][0]["limits"] = [40.0, 0.0, 5.0]
    (found,) = (e for e in summarize(made) if e["variant"] == "dflash")
    assert (found["efficiency"], found["limit"]) == (None, None)


def test_suites_are_summed_up_apart_where_there_are_several() -> None:
    made = report()
    made["runs"] += [{**r, "suite": "math", "prompt": 1} for r in made["runs"]]
    assert {e["suite"] for e in summarize(made)} == {"all", "code", "math"}
    assert {e["suite"] for e in report()["summary"]} == {"all"}


class Page(HTMLParser):
    """Collects what a page is made of, and whether its tags close in order."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID and tag not in self.open:
            return
        while self.open and self.open[-1] != tag and self.open[-1] in self.VOID:
            self.open.pop()
        assert self.open.pop() == tag


def plots(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def marks(plot: ElementTree.Element) -> list[ElementTree.Element]:
    return [element for element in plot.iter() if element.get("class") == "mark"]


def test_page_has_every_plot_with_its_marks() -> None:
    html = render_html(report())
    speed, acceptance, stages = plots(html)
    assert len(marks(speed)) == 2  # variants
    assert len(marks(acceptance)) == 2  # positions
    assert len(marks(stages)) == 5
    heights = [float(mark.get("height", "0")) for mark in marks(speed)]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.02)  # 20 and 5 tokens a second
    widths = [float(mark.get("width", "0")) for mark in marks(stages)]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.02)
    numbers = re.findall(r"(?:NaN|nan|inf)\b", html)
    assert numbers == []


def test_long_texts_have_a_plot_of_their_acceptance_length() -> None:
    made = report()
    for r in made["runs"][3:]:
        r["windows"] = [[2, 4], [2, 2]]
    made["summary"] = summarize(made)
    assert entry(made, "dflash")["by_window"] == [3.0, 2.0]
    _, _, windows, _ = plots(render_html(made))
    high, low = (float(mark.get("cy", "0")) for mark in marks(windows))
    assert high < low  # SVG counts from the top
    assert windows.get("aria-label") == "acceptance length over the text"


def test_page_is_sound_and_loads_nothing() -> None:
    page = Page()
    html = render_html(report())
    page.feed(html)
    page.close()
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.tags}
    named = [a for _, a in page.tags if {"src", "href", "srcset"} & a.keys()]
    assert named == []
    assert not re.search(r"url\(|@import|https?://", html)
    assert "a &lt;model&gt;" in html
    assert "<model>" not in html


def test_page_colours_tokens_by_origin() -> None:
    tokens = re.findall(r'<span class="token (\w+)"[^>]*>([^<]*)</span>', render_html(report()))
    assert tokens == [("first", "&lt;a"), ("drafted", "b"), ("bonus", "c")]


def test_simulated_page_says_so_at_every_heading() -> None:
    html = render_html(report(simulated=True))
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert len(headings) == 4
    assert all("simulated" in heading for heading in headings)
    assert "simulated" not in render_html(report()).partition("</style>")[2].lower()


def printed(made: dict[str, Any]) -> list[str]:
    stream = StringIO()
    print_report(made, Console(file=stream, highlight=False))
    return [line for line in stream.getvalue().splitlines() if line]


def test_plain_table() -> None:
    lines = printed(report())
    (row,) = (line for line in lines if line.startswith("dflash") and "3/3" in line)
    assert row.split() == [
        "dflash", "20.0", "2.5-20.0", "2.00", "1.00-4.00", "16", "2.50", "1.00", "0.50", "3/3"
    ]  # fmt: skip
    assert any(line.split() == ["dflash", "100%", "50%"] for line in lines)
    assert any(
        line.split() == ["dflash", "25.00", "100.00", "0.00", "25.00", "25.00", "4"]
        for line in lines
    )


def test_table_on_a_terminal_takes_names_as_they_are() -> None:
    made = json.loads(json.dumps(report()).replace("dflash", "[red]dflash"))
    stream = StringIO()
    print_report(made, Console(file=stream, force_terminal=True, width=200, highlight=False))
    assert re.search(r"\[red\]dflash +20\.0", stream.getvalue())


def test_every_simulated_line_says_so() -> None:
    lines = printed(report(simulated=True))
    assert len(lines) > 10
    assert all(line.startswith("simulated: ") for line in lines)


def test_compare_gives_ratios_with_the_range_of_both() -> None:
    before, after = report(), report()
    for r in after["runs"]:
        r["decode_seconds"] /= 10
    after["summary"] = summarize(after)
    found = {c.variant: c for c in compare_reports(before, after)}
    assert found["dflash"].ratio == pytest.approx(10)
    assert found["dflash"].low == pytest.approx(25 / 20)
    assert found["dflash"].high == pytest.approx(200 / 2.5)
    assert found["dflash"].certain
    assert not any(c.certain for c in compare_reports(before, before))


def test_what_mlx_takes_from_the_environment_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in MLX_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_HOSTFILE", "/a/path/of/somebody")
    assert machine()["mlx_settings"] == {}
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "120")
    assert machine()["mlx_settings"] == {"MLX_MAX_OPS_PER_BUFFER": "120"}
    assert machine()["memory_bytes"] > 2**20


def test_compare_says_what_differs() -> None:
    before, after = report(), report()
    assert differences(before, after) == []
    after["machine"]["device"] = "other"
    after["versions"]["mlx"] = "9"
    lines = differences(before, after)
    assert lines == [
        "machine: device was chip, is other",
        "versions: mlx was 1, is 9",
    ]


def test_compare_refuses_what_has_nothing_in_common() -> None:
    other = copy.deepcopy(report())
    for e in other["summary"]:
        e["length"] = 99
    with pytest.raises(UsageError, match="no variant"):
        compare_reports(report(), other)
    with pytest.raises(UsageError, match="simulated"):
        compare_reports(report(), report(simulated=True))


def test_read_report(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(report()))
    assert read_report(file) == json.loads(file.read_text())
    for text, message in [
        ("{}", "no benchmark report"),
        ("x", "not JSON"),
        (json.dumps({**report(), "format": 2}), "format 2"),
    ]:
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_report(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_report(tmp_path / "missing.json")
