"""A process that runs checks of kernels for a self-test, one after another.

It is two: one that works, and one over it that waits for its end, and can be told to end it
(SIGTERM). If that one is killed, the other goes on with its check and then ends: a driver keeps
what it compiles only once it is done, and may take longer than the self-test has.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from draftloom.kernels.backend import kernels_built
from draftloom.plugins import PluginManager

from .self_test_report import Ran, run_check

__all__ = ["run", "serve"]

LONGEST = 300
"""Seconds after which a process ends in any case, whatever it waits for."""


def run(work: Callable[[Connection], None], asked: Connection) -> None:
    """Work in a process below this one, and end as it does. Nothing may have used the GPU yet."""
    below = os.fork()
    if not below:
        signal.alarm(LONGEST)
        try:
            work(asked)
        except BaseException:  # noqa: BLE001 - what ends this process, and is told
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    asked.close()  # or it would not end with the process that works
    signal.signal(signal.SIGTERM, lambda *_: os.kill(below, signal.SIGKILL))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(below, 0)[1]))


def serve(asked: Connection) -> None:
    """Answer (``operation/name``, index of the check) by how it went, until nobody asks any more.
    The answer is None where no plugin that is installed has the kernel. Only kernels that are
    asked for are imported."""
    os.dup2(2, 1)  # whatever a kernel prints is no report
    plugins = PluginManager()
    known = set(plugins.names("kernel"))
    while True:
        try:
            kernel, index = asked.recv()
        except EOFError:
            return
        found = _ran(plugins, kernel, index) if kernel in known else None
        try:
            asked.send(found)
        except BrokenPipeError:  # the self-test is over
            return


def _ran(plugins: PluginManager, kernel: str, index: int) -> Ran:
    begin, built = time.perf_counter(), kernels_built()
    factory: Any = plugins.component("kernel", kernel).load()
    (check,) = islice(factory.checks(), index, index + 1)
    found = run_check(check)
    return Ran(found, time.perf_counter() - begin, kernels_built() - built)
