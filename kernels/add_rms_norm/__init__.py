"""A residual addition and the RMS norm behind it.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`add_norm` runs it.
- ``OPERATION.choose`` says which implementation serves a request, and why.
"""

from . import array, reference
from .dispatch import MOST_ROWS, OPERATION, add_norm
from .gpu import TIMED, cuda, metal
from .launch import Request

__all__ = [
    "MOST_ROWS",
    "OPERATION",
    "TIMED",
    "Request",
    "add_norm",
    "array",
    "cuda",
    "metal",
    "reference",
]
