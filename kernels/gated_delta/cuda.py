"""The kernels on CUDA (MLX-CUDA on Linux)."""

from collections.abc import Iterator

from draftloom.kernels.backend import ON_CPU
from draftloom.kernels.check import Check
from draftloom.kernels.compiled_cuda import cuda_kernel

from .launch import Backend, Launcher, Request, unsupported_shape
from .source import CUDA_PRELUDE
from .targets import why_not_for

__all__ = ["BACKEND", "LAUNCHER", "by_default", "checks", "supports", "why_not_for", "why_not_here"]

BACKEND = Backend("cuda", cuda_kernel, CUDA_PRELUDE, memory=48 * 1024)
LAUNCHER = Launcher(BACKEND)
why_not_here = BACKEND.why_not_here


def by_default() -> bool:
    """Whether `auto` takes these kernels here."""
    return why_not_here() is None


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("cuda")


def supports(request: Request) -> str | None:
    """None if these kernels can serve the request here, else the reason why not."""
    on_cpu = None if request.device == "gpu" else ON_CPU
    return BACKEND.why_missing() or on_cpu or unsupported_shape(request)
