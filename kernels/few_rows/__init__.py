"""Products of few rows with a matrix: what a block of draft tokens makes of every layer.

A library's product of 16 rows asks for its best algorithm at every call, which takes the host
longer than the product takes the device. Here it is one kernel launch, planned once for a shape.

Importing this package compiles nothing: a kernel is compiled at its first launch.

- :func:`product` runs it.
- ``OPERATION.wanted`` says which kernel, if any, a setting of the operation asks for here.
"""

from . import array, reference
from .dispatch import OPERATION, product
from .gpu import TIMED, cuda
from .launch import MOST_ROWS, Request
from .layers import FewRowsEmbedding, FewRowsLinear, exchange

__all__ = [
    "MOST_ROWS",
    "OPERATION",
    "TIMED",
    "FewRowsEmbedding",
    "FewRowsLinear",
    "Request",
    "array",
    "cuda",
    "exchange",
    "product",
    "reference",
]
