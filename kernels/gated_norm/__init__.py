"""The gated norm behind the gated delta rule: RMS norm of each head times SiLU of a gate.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`normalise` runs it.
- ``OPERATION.choose`` says which implementation serves a request, and why.
"""

from . import array, reference
from .dispatch import OPERATION, normalise
from .gpu import TIMED, cuda, metal
from .launch import Request

__all__ = [
    "OPERATION",
    "TIMED",
    "Request",
    "array",
    "cuda",
    "metal",
    "normalise",
    "reference",
]
