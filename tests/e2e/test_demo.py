"""`python -m draftloom.apps.demo`, as `make demo` runs it."""

from __future__ import annotations

import io
import subprocess
import sys

import attrs
import pytest
from rich.console import Console

import draftloom
from draftloom.apps import demo
from draftloom.apps.prompts import DEMO_PROMPT


@pytest.mark.slow
def test_demo_as_a_process() -> None:
    command = [sys.executable, "-m", "draftloom.apps.demo", "--max-tokens", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(DEMO_PROMPT)
    for word in ("acceptance length", "cycles", "tokens/s", "target alone", "mlx-lm 0."):
        assert word in done.stdout, word
    assert "yes: all 12 tokens equal the target's own" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


@pytest.fixture
def report() -> demo.DemoReport:
    """A made-up report: 4 cycles in 2 seconds."""
    stats = draftloom.GenerationStats(
        prompt_tokens=5, generated_tokens=13, cycles=4, committed=12, drafted=12, accepted=8,
        verified_by_position=[4, 4, 4], accepted_by_position=[4, 3, 1], decode_seconds=2.0,
    )  # fmt: skip
    names = dict.fromkeys(("target", "drafter", "rollback"), "x") | {"width": "fixed 3"}
    result = draftloom.GenerationResult("", (), "length", stats, 0, names)
    return demo.DemoReport(result, 6.0, 3.0, "all equal", "identical", "A chip (gpu)", "bfloat16")


def shown(report: demo.DemoReport, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=100)
    console.print(demo.render(report, console))
    stream.seek(0)
    return stream.read()


def test_speed_is_told_as_it_is(report: demo.DemoReport) -> None:
    assert "2.00 times as fast" in shown(report)
    slow = attrs.evolve(report, plain_tokens_per_second=30.0, device="A chip (cpu)")
    assert "slower: a cycle gives 3.0, costs 15.0 on this CPU" in shown(slow)


def test_bars_follow_the_rates_also_without_unicode(report: demo.DemoReport) -> None:
    text = shown(report, "ascii")
    assert "#" * demo.BAR + " 100%" in text
    assert "#" * round(0.75 * demo.BAR) + "." in text
    assert "█" * demo.BAR in shown(report)


def test_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--block-size", "99"]) == 2
    assert "block size 99" in capfd.readouterr().err
