"""The gated delta rule with a tape: verify a block, replay an accepted prefix, prefill a prompt.

Importing this package compiles nothing; kernels are built at their first use.
"""

from .array import prefill, replay, verify
from .tape import Tape, concat_tapes

__all__ = ["Tape", "concat_tapes", "prefill", "replay", "verify"]
