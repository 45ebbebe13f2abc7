"""A process of a self-test: one that works, and one over it that waits for its end and can be told
to end it (SIGTERM).

If the one above is killed, the other goes on with its check and then ends: a driver keeps what it
compiles only once it is done, and may take longer than the self-test has. What works is forked
from a process that has not even imported MLX, since what has used CUDA cannot be forked: so this
module imports nothing but Python's own, and work is named by text.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

__all__ = ["LONGEST", "READY", "run"]

LONGEST = 300
"""Seconds after which a process ends in any case, whatever it waits for."""
READY = "ready"


def run(work: str, asked: Connection) -> None:
    """Work in a process below this one, and end as it does.

    Args:
        work: ``module:function``, called with the connection.
        asked: by which it is asked and answers; the first that it says is `READY`.
    """
    below = os.fork()
    if not below:
        signal.alarm(LONGEST)
        try:
            module, _, function = work.partition(":")
            serve = getattr(importlib.import_module(module), function)
            asked.send(READY)
            serve(asked)
        except BaseException:  # noqa: BLE001 - what ends this process, and is told
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    asked.close()  # or it would not end with the process that works
    signal.signal(signal.SIGTERM, lambda *_: os.kill(below, signal.SIGKILL))
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(below, 0)[1]))
