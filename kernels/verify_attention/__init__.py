"""Attention of a block of tokens over a long cache: few queries, many keys.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`attend` runs it.
- :func:`choose` says which implementation serves a request, and why.
- :func:`valid_lengths` prepares the length once for all layers.
"""

from . import array, cuda, metal
from .dispatch import IMPLEMENTATIONS, TIMED, Choice, attend, choose
from .launch import Request, valid_lengths

__all__ = [
    "IMPLEMENTATIONS",
    "TIMED",
    "Choice",
    "Request",
    "array",
    "attend",
    "choose",
    "cuda",
    "metal",
    "valid_lengths",
]
