"""What processes of a self-test do in tests; functions of a module that they can import."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from draftloom.apps.self_test_report import CheckResult, Ran


def dies_of_the_second(asked: Connection) -> None:
    while True:
        _, index = asked.recv()
        if index == 1:
            os._exit(3)
        asked.send(Ran(CheckResult(f"number {index}", 0.0, 0.1), 1.0, built=2))


def hangs(asked: Connection) -> None:
    time.sleep(60)


def marks_its_process(asked: Connection) -> None:
    """Says in a file, named by the kernel, which process it is; and again, two seconds later."""
    kernel, _ = asked.recv()
    for word in ("begun", "done"):
        Path(kernel, word).write_text(str(os.getpid()))
        time.sleep(2)
    time.sleep(60)
