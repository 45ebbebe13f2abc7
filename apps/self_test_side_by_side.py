"""The checks of a self-test in processes side by side: where kernels take seconds to compile, that
is what they wait for. A check that ends its process, or does not end, ends nothing else.

The processes are forked from one that has imported what takes longest, once for all of them, while
this one does the same. It knows nothing of MLX: what has used CUDA cannot be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import attrs

from draftloom.device import device_memory, on_cuda
from draftloom.kernels.check import Check

from .self_test_process import READY, run
from .self_test_report import NO_PROCESS, NO_TIME, CheckResult, Ran, run_check

__all__ = ["Item", "get_ready", "in_turns", "processes_here", "run_side_by_side"]

MOST = 16
BYTES_EACH = 4 * 2**30
"""Memory of the device for each process: a context on CUDA takes about half a GiB of it."""
PATIENCE = 60.0
"""Seconds after which a check is taken to hang."""
GRACE = 6.0
"""Seconds that checks in flight are given when no further one is begun."""
PRELOADED = [
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "transformers.tokenization_utils_fast",
]
"""Modules that are imported before processes are forked, as far as they are there: what mlx-lm
imports and takes longest."""

WORK = "draftloom.apps.self_test_worker:serve"


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


def processes_here() -> int:
    """How many processes a self-test is worth on this device: 1 but on CUDA, where there is
    much to compile."""
    if not on_cuda():
        return 1
    memory = device_memory() or BYTES_EACH
    return max(1, min(MOST, os.cpu_count() or 1, memory // BYTES_EACH))


def get_ready() -> BaseContext:
    """What processes are started by; begins at once with what they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()
    return context


def run_side_by_side(
    items: Sequence[Item],
    processes: int,
    until: float,
    progress: Callable[[str], None] = lambda what: None,
    *,
    work: str | None = None,
    patience: float = PATIENCE,
    grace: float = GRACE,
) -> list[Ran]:
    """Run checks, in order as processes come free.

    Args:
        items: the checks.
        processes: how many are started at most.
        until: when, by `time.perf_counter`, no further check is begun.
        progress: told what runs next; by one thread at a time.
        work: ``module:function``, what a process does: for each (kernel, index) that comes by the
            connection it sends a `Ran`, or None where it does not know the kernel. None is `WORK`:
            the checks of the plugins that are installed.
        patience: seconds after which a check's process is killed, and the check has failed.
        grace: seconds after `until` at which the check is left out in any case: it may have waited
            for compilers alone. Its process ends with it, later; what was compiled is kept for the
            next self-test.

    Returns:
        One for each item.
    """
    start = _Start(get_ready(), work or WORK)
    waiting = deque(enumerate(items))
    results: dict[int, Ran | None] = {}
    lock = threading.Lock()

    def take_turns() -> None:
        process = _Process(start, patience)
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

    threads = [threading.Thread(target=take_turns) for _ in range(min(processes, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [_here(item) if (ran := results[i]) is None else ran for i, item in enumerate(items)]


class _Start:
    """Starts processes, one at a time whatever the thread.

    Args:
        context: of `get_ready`.
        work: what a process does.

    Attributes:
        works: whether any has begun its work; None before that is known.
    """

    def __init__(self, context: BaseContext, work: str) -> None:
        self._context, self._work = context, work
        self._lock = threading.Lock()
        self.works: bool | None = None

    def __call__(self) -> tuple[Any, Connection]:
        """The process, and the connection by which it is asked."""
        here, there = self._context.Pipe()
        process = self._context.Process(  # type: ignore[attr-defined]
            target=run, args=(self._work, there), daemon=True
        )
        with self._lock:
            process.start()
        there.close()  # so that the connection ends with the process
        return process, here


class _Process:
    """A worker, started when it is needed, and anew when it has ended."""

    def __init__(self, start: _Start, patience: float) -> None:
        self._start, self._patience = start, patience
        self._running: tuple[Any, Connection] | None = None

    def run(self, item: Item, end: float) -> Ran | None:
        """None where the process does not know the kernel. What runs at `end` is left out."""
        if self._start.works is False:
            return _left_out(item, NO_PROCESS)
        begin = time.perf_counter()
        until = min(begin + self._patience, end)
        ready = self._running is not None
        try:
            if self._running is None:
                self._running = self._start()
            process, asked = self._running
            if not ready:
                self._start.works = ready = _answer(asked, until) == READY
            asked.send((item.kernel, item.index))
            found: Ran | None = _answer(asked, until)
            return found
        except TimeoutError:
            if time.perf_counter() < end:
                process.terminate()
            else:
                process.kill()  # the one over it alone: what it compiles is kept
        except (EOFError, OSError):  # it has ended
            if not ready:
                self._start.works = self._start.works or False
                self.end()
                return _left_out(item, NO_PROCESS)
        seconds = time.perf_counter() - begin
        status = self.end()
        failure = f"its process ended with status {status}"
        if seconds >= self._patience:
            failure = f"did not end within {self._patience:.0f} s"
        elif time.perf_counter() >= end:
            return _left_out(item)
        return Ran(CheckResult(item.check.name, None, None, failure), seconds)

    def end(self) -> int | None:
        """The status that it ended with; None where it never began."""
        if self._running is None:
            return None
        process, asked = self._running
        self._running = None
        asked.close()
        process.join(GRACE)
        status: int | None = process.exitcode
        return status


def _answer(asked: Connection, until: float) -> Any:
    """What a process says, by then."""
    if not asked.poll(max(until - time.perf_counter(), 0.0)):
        raise TimeoutError
    return asked.recv()


def _left_out(item: Item, reason: str = NO_TIME) -> Ran:
    return Ran(CheckResult(item.check.name, None, None, left_out=reason))


def _here(item: Item) -> Ran:
    begin = time.perf_counter()
    result = run_check(item.check)
    return Ran(result, time.perf_counter() - begin)


def in_turns(lists: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of each, then the second of each, and so on: none waits for all of another."""
    columns = [list(items) for items in lists]
    longest = max((len(items) for items in columns), default=0)
    return [items[i] for i in range(longest) for items in columns if i < len(items)]
