"""RMS norms and rotary positions of queries and keys, read from one packed product.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`place` runs it.
- ``OPERATION.choose`` says which implementation serves a request, and why.
"""

from . import array, reference
from .dispatch import OPERATION, place
from .gpu import TIMED, cuda, metal
from .launch import Request
from .placing import Heads, Rotation

__all__ = [
    "OPERATION",
    "TIMED",
    "Heads",
    "Request",
    "Rotation",
    "array",
    "cuda",
    "metal",
    "place",
    "reference",
]
