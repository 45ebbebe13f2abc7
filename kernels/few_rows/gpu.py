"""The kernel, by backend."""

from __future__ import annotations

from collections.abc import Iterator

from draftloom.kernels.backend import CUDA_BUILTINS, Backend
from draftloom.kernels.check import Check
from draftloom.kernels.compiled_cuda import cuda_kernel
from draftloom.kernels.gpu_kernel import GpuKernel
from draftloom.kernels.verify_attention.prelude import CUDA_MMA

from .launch import Launcher, unsupported

__all__ = ["TIMED", "cuda"]

TIMED: frozenset[str] = frozenset({"cuda"})
"""Backends on which the kernel was timed and found to pay: there `auto` runs it."""


def checks(name: str) -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of(name)


cuda = GpuKernel(
    Launcher(Backend("cuda", cuda_kernel, CUDA_BUILTINS + CUDA_MMA, 48 * 1024, least=80)),
    TIMED,
    unsupported,
    checks,
)
