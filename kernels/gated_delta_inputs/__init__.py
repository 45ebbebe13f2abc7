"""What stands between a gated-delta layer's projections and its recurrence, as one operation.

Causal convolution over the last few tokens, SiLU, the split into q, k and v, their norms, and the
gates: about ten small operations a layer in array code, one launch as a kernel.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`prepare` runs it.
- ``OPERATION.choose`` says which implementation serves a request, and why.
"""

from . import array, reference
from .dispatch import OPERATION, Request, prepare
from .gpu import TIMED, cuda, metal
from .layer import Layer, Prepared, Projected

__all__ = [
    "OPERATION",
    "TIMED",
    "Layer",
    "Prepared",
    "Projected",
    "Request",
    "array",
    "cuda",
    "metal",
    "prepare",
    "reference",
]
