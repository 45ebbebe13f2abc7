"""The built-in kernels."""

from __future__ import annotations

from draftloom.contracts import ComponentInfo
from draftloom.hookspecs import Register, hookimpl

__all__ = ["register_kernels"]


@hookimpl
def register_kernels(register: Register) -> None:
    """gated-delta/array: mlx-lm's order of operations, on any device."""
    register(
        "gated-delta/array",
        "draftloom.kernels.gated_delta.array:verify",
        ComponentInfo("gated-delta/array", "token by token, in mlx-lm's order of operations"),
    )
