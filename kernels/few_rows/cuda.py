"""The kernel on CUDA (MLX-CUDA on Linux)."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.backend import CUDA_BUILTINS, ON_CPU, Backend
from draftloom.kernels.check import Check
from draftloom.kernels.verify_attention.prelude import CUDA_MMA

from .launch import Launcher, Request, unsupported

__all__ = ["BACKEND", "LAUNCHER", "by_default", "checks", "supports", "why_not_here"]

BACKEND = Backend("cuda", mx.fast.cuda_kernel, CUDA_BUILTINS + CUDA_MMA, 48 * 1024)
LAUNCHER = Launcher(BACKEND)
why_not_here = BACKEND.why_not_here


def by_default() -> bool:
    """Whether `auto` takes this kernel here."""
    from .dispatch import OPERATION

    return OPERATION.default() == "cuda"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("cuda")


def supports(request: Request) -> str | None:
    """None if this kernel can serve the request here, else the reason why not."""
    on_cpu = None if request.device == "gpu" else ON_CPU
    return on_cpu or why_not_here() or unsupported(request)
