"""What a process of a self-test does: it runs checks of kernels, one after another."""

from __future__ import annotations

import os
import time
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from draftloom.kernels.backend import kernels_built
from draftloom.plugins import PluginManager

from .self_test_report import Ran, run_check

__all__ = ["serve"]


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
