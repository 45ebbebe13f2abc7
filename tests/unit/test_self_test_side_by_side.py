"""Checks of a self-test in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from draftloom.apps import self_test_side_by_side as side_by_side
from draftloom.apps.self_test import run_self_test
from draftloom.apps.self_test_report import NO_PROCESS, NO_TIME
from draftloom.apps.self_test_side_by_side import Item, in_turns, run_side_by_side
from draftloom.kernels.check import Check

from . import fakes
from .test_self_test import Lab, Other, check, named

LATE = float("inf")
WORK = "tests.support.self_test_workers:"
ROOT = Path(__file__).parents[2]


def items(number: int) -> list[Item]:
    return [Item("no-such.kernel/here", i, check(1.0, name=f"number {i}")) for i in range(number)]


@pytest.mark.slow
def test_processes_find_what_one_finds() -> None:
    told: list[str] = []
    alone = run_self_test(fakes.plugins(), seconds=600.0)
    found = run_self_test(fakes.plugins(), told.append, seconds=600.0, processes=2)
    assert found.passed
    for one, other in zip(alone.tested, found.tested, strict=True):
        assert (one.kernel, one.skipped, one.by_default) == (
            other.kernel, other.skipped, other.by_default,
        )  # fmt: skip
        assert [c.name for c in one.checks] == [c.name for c in other.checks]
        assert [c.error for c in one.checks] == [c.error for c in other.checks]
    run = [c for one in found.tested for c in one.checks]
    assert len(run) > 50
    assert len(told) <= len(run), "no check is run twice"
    assert len(set(told)) == len(told)


@pytest.mark.slow
def test_what_no_process_knows_is_checked_here() -> None:
    wrong = Other(check(2.0, name="off"), check(1.0, name="right"))
    plugins = fakes.plugins(Lab(my_lab_op__fast=wrong))
    found = run_self_test(plugins, seconds=600.0, processes=2)
    mine = named(found, "my-lab.op/fast")
    assert [c.passed for c in mine.checks] == [False, True]
    assert not found.passed


def test_a_check_that_ends_its_process_ends_nothing_else() -> None:
    found = run_side_by_side(items(4), 1, LATE, work=WORK + "dies_of_the_second")
    assert [one.result.failure for one in found] == ["", "its process ended with status 3", "", ""]
    assert [one.built for one in found] == [2, 0, 2, 2]
    assert [one.result.name for one in found] == [f"number {i}" for i in range(4)]


def test_a_process_that_never_begins_says_nothing_of_a_check() -> None:
    found = run_side_by_side(items(3), 2, LATE, work="no_such_module_of_a_test:serve")
    assert [one.result.left_out for one in found] == [NO_PROCESS] * 3


def test_a_program_that_does_not_guard_its_main_part_fails_no_check(tmp_path: Path) -> None:
    """Python runs it again in every process, where it must not start others."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from draftloom.apps.self_test_side_by_side import run_side_by_side\n"
        "from tests.unit.test_self_test_side_by_side import LATE, WORK, items\n"
        "found = run_side_by_side(items(2), 1, LATE, work=WORK + 'dies_of_the_second')\n"
        "print([one.result.left_out or one.result.failure for one in found])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str([NO_PROCESS] * 2)
    assert "bootstrapping phase" in done.stderr


def test_a_check_that_does_not_end_is_given_up() -> None:
    (found,) = run_side_by_side(items(1), 4, LATE, work=WORK + "hangs", patience=1.0)
    assert found.result.failure == "did not end within 1 s"
    assert not found.result.passed


def test_what_runs_when_the_time_is_over_is_left_out() -> None:
    """It may have waited for a compiler: that is no failure."""
    begin = time.perf_counter()
    (found,) = run_side_by_side(items(1), 4, begin + 0.5, work=WORK + "hangs", grace=0.5)
    assert time.perf_counter() - begin < 30
    assert found.result.left_out == NO_TIME
    assert not found.result.failure


def ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def soon(condition: Callable[[], bool]) -> bool:
    until = time.perf_counter() + 30
    while not condition() and time.perf_counter() < until:
        time.sleep(0.1)
    return condition()


def test_what_is_left_out_goes_on_and_what_hangs_does_not(tmp_path: Path) -> None:
    """A driver keeps what it compiles only once it is done."""
    item = Item(str(tmp_path), 0, check(1.0))
    begun, done = tmp_path / "begun", tmp_path / "done"
    late = time.perf_counter() + 3
    (found,) = run_side_by_side([item], 1, late, work=WORK + "marks_its_process", grace=0.0)
    assert found.result.left_out == NO_TIME
    assert soon(done.exists)
    os.kill(int(begun.read_text()), signal.SIGKILL)
    (found,) = run_side_by_side([item], 1, LATE, work=WORK + "marks_its_process", patience=4.0)
    assert found.result.failure == "did not end within 4 s"
    assert soon(lambda: ended(int(begun.read_text())))


def test_no_check_is_begun_after_the_time() -> None:
    found = run_side_by_side(items(3), 2, time.perf_counter(), work=WORK + "dies_of_the_second")
    assert [one.result.left_out for one in found] == ["not run (time)"] * 3


def test_processes_begin_with_what_takes_longest_to_import_and_nothing_of_mlx() -> None:
    """In an interpreter of its own: another test's processes may come from elsewhere."""
    program = """
from draftloom.apps.self_test_side_by_side import run_side_by_side
from tests.unit.test_self_test_side_by_side import LATE, items
if __name__ == "__main__":
    found = run_side_by_side(items(2), 2, LATE, work="tests.support.bare_worker:tells")
    print(*(one.result.failure for one in found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["transformers"] * 2


def test_kernels_take_turns() -> None:
    a, b, c = items(3), items(1), items(2)
    assert in_turns([a, b, c]) == [a[0], b[0], c[0], a[1], c[1], a[2]]
    assert in_turns([]) == []


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert side_by_side.processes_here() == 1, "nothing is compiled for long on a CPU"
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 64)
    for memory, wanted in ((80 * 2**30, 16), (12 * 2**30, 3), (2 * 2**30, 1)):
        monkeypatch.setattr(side_by_side, "device_memory", lambda memory=memory: memory)
        assert side_by_side.processes_here() == wanted


def test_the_same_check_is_run_once() -> None:
    same = [Check("one", list, list, (), same="the very same") for _ in range(2)]
    first, second = (Item("a/b", i, one) for i, one in enumerate(same))
    assert first.same == second.same
    assert items(2)[0].same != items(2)[1].same
