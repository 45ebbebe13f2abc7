"""The gated delta rule with a tape: verify a block, replay an accepted prefix, prefill a prompt.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`verify` runs a block and records a :class:`Tape`.
- :func:`replay` brings the old state forward by the accepted part of a tape.
- :func:`replay_verify` does both at once: one launch a layer and cycle.
- :func:`row_counts` prepares per-row counts once for all layers.
- :func:`prefill` runs a prompt.
- :func:`choose` says which implementation serves a request, and why.
- :func:`prefer` names an implementation to take wherever it serves a request.
"""

from . import deferral
from .dispatch import (
    IMPLEMENTATIONS,
    Choice,
    Preference,
    choose,
    prefer,
    prefill,
    replay,
    replay_verify,
    verify,
)
from .launch import Request, row_counts
from .tape import Tape, concat_tapes

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Preference",
    "Request",
    "Tape",
    "choose",
    "concat_tapes",
    "deferral",
    "prefer",
    "prefill",
    "replay",
    "replay_verify",
    "row_counts",
    "verify",
]
