"""The built-in kernels."""

from __future__ import annotations

from draftloom.contracts import ComponentInfo
from draftloom.hookspecs import Register, hookimpl

__all__ = ["register_kernels"]


_GATED_DELTA = {
    "array": "token by token, in mlx-lm's order of operations",
    "chunked": "a chunk of tokens at a time, differentiable",
    "cuda": "one launch a block, CUDA",
    "metal": "one launch a block, Metal",
}


@hookimpl
def register_kernels(register: Register) -> None:
    """The implementations of the gated delta rule."""
    for name, summary in _GATED_DELTA.items():
        full = f"gated-delta/{name}"
        register(full, f"draftloom.kernels.gated_delta:{name}", ComponentInfo(full, summary))
