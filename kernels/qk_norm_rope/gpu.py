"""The kernel, by backend."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.backend import Backend
from draftloom.kernels.check import Check
from draftloom.kernels.compiled_cuda import cuda_kernel
from draftloom.kernels.gpu_kernel import GpuKernel

from .launch import Launcher, unsupported
from .source import CUDA_PRELUDE, METAL_PRELUDE

__all__ = ["TIMED", "cuda", "metal"]

TIMED: frozenset[str] = frozenset({"cuda"})
"""Backends on which the kernel was timed and found to pay: there `auto` runs it."""


def checks(name: str) -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of(name)


cuda = GpuKernel(Launcher(Backend("cuda", cuda_kernel, CUDA_PRELUDE)), TIMED, unsupported, checks)
metal = GpuKernel(
    Launcher(Backend("metal", mx.fast.metal_kernel, METAL_PRELUDE)), TIMED, unsupported, checks
)
