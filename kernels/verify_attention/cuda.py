"""The kernels on CUDA (MLX-CUDA on Linux)."""

from __future__ import annotations

from collections.abc import Iterator

from draftloom.kernels.backend import Backend
from draftloom.kernels.check import Check
from draftloom.kernels.compiled_cuda import cuda_kernel

from .launch import TIMED, Launcher, Request, unsupported_shape
from .prelude import CUDA_PRELUDE
from .targets import why_not_for

__all__ = [
    "BACKEND",
    "LAUNCHER",
    "attend",
    "by_default",
    "checks",
    "supports",
    "why_not_for",
    "why_not_here",
]

BACKEND = Backend("cuda", cuda_kernel, CUDA_PRELUDE, memory=48 * 1024, least=80)
LAUNCHER = Launcher(BACKEND)
attend = LAUNCHER.attend
why_not_here = BACKEND.why_not_here


def by_default() -> bool:
    """Whether `auto` runs the kernel here: only where it has been timed."""
    return "cuda" in TIMED and why_not_here() is None


def checks() -> Iterator[Check]:
    """The parity checks, on the default device."""
    from .checks import checks_of

    return checks_of("cuda")


def supports(request: Request) -> str | None:
    """None if these kernels can serve the request here, else the reason why not."""
    return why_not_here() or unsupported_shape(request)
