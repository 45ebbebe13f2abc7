"""A process that runs checks of kernels for a self-test, one after another.

    python -m draftloom.apps.self_test_worker

Asked by lines on stdin, ``{"kernel": OPERATION/NAME, "check": INDEX}``; answers each by a line on
what was its stdout: ``error``, ``tolerance``, ``failure`` as in `CheckResult`, ``seconds``, and how
many kernels were ``built``. ``{"unknown": true}`` where no plugin of this process has the kernel.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import islice
from typing import Any

from draftloom.kernel_settings import Implementation, implementations
from draftloom.kernels.backend import kernels_built
from draftloom.plugins import PluginManager

from .self_test_report import run_check

__all__ = ["main"]


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a kernel prints is no answer
    known = {one.full_name: one for one in implementations(PluginManager())}
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_answer(known, asked["kernel"], asked["check"])), file=answers, flush=True)


def _answer(known: dict[str, Implementation], kernel: str, index: int) -> dict[str, Any]:
    if kernel not in known:
        return {"unknown": True}
    begin, built = time.perf_counter(), kernels_built()
    factory: Any = known[kernel].factory
    (check,) = islice(factory.checks(), index, index + 1)
    found = run_check(check)
    return {
        "error": found.error,
        "tolerance": found.tolerance,
        "failure": found.failure,
        "seconds": time.perf_counter() - begin,
        "built": kernels_built() - built,
    }


if __name__ == "__main__":
    main()
