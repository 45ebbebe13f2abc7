"""The checks of a self-test in processes side by side: where kernels take seconds to compile, that
is what they wait for. A check that ends its process, or does not end, ends nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.check import Check
from draftloom.memory import device_memory

from .self_test_report import NO_TIME, CheckResult, run_check

__all__ = ["Item", "Ran", "in_turns", "processes_here", "run_side_by_side"]

MOST = 16
BYTES_EACH = 4 * 2**30
"""Memory of the device for each process: a context on CUDA takes about half a GiB of it."""
PATIENCE = 60.0
"""Seconds after which a check is taken to hang."""
GRACE = 6.0
"""Seconds that checks in flight are given when no further one is begun."""
WORKER = (sys.executable, "-m", "draftloom.apps.self_test_worker")


@attrs.frozen
class Item:
    """One check to run.

    Attributes:
        kernel: ``operation/implementation``.
        index: of the check in that implementation's `checks()`.
        check: itself, which is run here where another process does not know the kernel.
    """

    kernel: str
    index: int
    check: Check

    @property
    def same(self) -> str:
        """Items with the same words here do the very same."""
        return self.check.same or f"{self.kernel} {self.index}"


@attrs.frozen
class Ran:
    """How a check went, and the seconds and newly compiled kernels that it took."""

    result: CheckResult
    seconds: float = 0.0
    built: int = 0


def processes_here() -> int:
    """How many processes a self-test is worth on this device: 1 but on CUDA, where there is
    much to compile."""
    if not mx.cuda.is_available() or mx.default_device() != mx.gpu:
        return 1
    memory = device_memory() or BYTES_EACH
    return max(1, min(MOST, os.cpu_count() or 1, memory // BYTES_EACH))


def run_side_by_side(
    items: Sequence[Item],
    processes: int,
    until: float,
    progress: Callable[[str], None] = lambda what: None,
    *,
    worker: Sequence[str] = WORKER,
    patience: float = PATIENCE,
    grace: float = GRACE,
) -> list[Ran]:
    """Run checks, in order as processes come free.

    Args:
        items: the checks.
        processes: how many are started at most; each loads the plugins that are installed.
        until: when, by `time.perf_counter`, no further check is begun.
        progress: told what runs next; by one thread at a time.
        worker: the command of a process; see `draftloom.apps.self_test_worker`.
        patience: seconds after which a check's process is killed, and the check has failed.
        grace: seconds after `until` at which it is killed in any case, and the check left out: it
            may have waited for compilers alone, and what they made is kept for the next self-test.

    Returns:
        One for each item.
    """
    waiting = deque(enumerate(items))
    results: dict[int, Ran | None] = {}
    lock = threading.Lock()

    def work() -> None:
        process = _Process(worker, patience)
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    place, item = waiting.popleft()
                    late = time.perf_counter() >= until
                    if not late:
                        progress(f"{item.kernel}: {item.check.name}")
                results[place] = _left_out(item) if late else process.run(item, until + grace)
        finally:
            process.end()

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [_here(item) if (ran := results[i]) is None else ran for i, item in enumerate(items)]


class _Process:
    """A worker, started when it is needed, and anew when it has ended."""

    def __init__(self, command: Sequence[str], patience: float) -> None:
        self._command, self._patience = command, patience
        self._process: subprocess.Popen[str] | None = None

    def run(self, item: Item, end: float) -> Ran | None:
        """None where the process does not know the kernel. What runs at `end` is left out."""
        begin = time.perf_counter()
        allowed = min(self._patience, max(end - begin, 0.0))
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(allowed, process.kill)
        timer.start()
        try:
            print(json.dumps({"kernel": item.kernel, "check": item.index}), file=process.stdin)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            seconds = time.perf_counter() - begin
            self.end()
            failure = f"its process ended with status {process.returncode}"
            if seconds >= self._patience:
                failure = f"did not end within {self._patience:.0f} s"
            elif seconds >= allowed:
                return _left_out(item)
            return Ran(CheckResult(item.check.name, None, None, failure), seconds)
        return _ran(item, json.loads(line))

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


def _ran(item: Item, answer: dict[str, Any]) -> Ran | None:
    if "unknown" in answer:
        return None
    result = CheckResult(item.check.name, answer["error"], answer["tolerance"], answer["failure"])
    return Ran(result, answer["seconds"], answer["built"])


def _left_out(item: Item) -> Ran:
    return Ran(CheckResult(item.check.name, None, None, left_out=NO_TIME))


def _here(item: Item) -> Ran:
    begin = time.perf_counter()
    result = run_check(item.check)
    return Ran(result, time.perf_counter() - begin)


def in_turns(lists: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of each, then the second of each, and so on: none waits for all of another."""
    columns = [list(items) for items in lists]
    longest = max((len(items) for items in columns), default=0)
    return [items[i] for i in range(longest) for items in columns if i < len(items)]
