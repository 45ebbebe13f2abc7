"""The kernel on Metal (macOS)."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from draftloom.kernels.backend import ON_CPU, Backend
from draftloom.kernels.check import Check
from draftloom.kernels.gated_delta.targets import why_not_for

from .launch import Launcher, Request, unsupported
from .source import METAL_PRELUDE

__all__ = ["BACKEND", "LAUNCHER", "by_default", "checks", "supports", "why_not_for", "why_not_here"]

BACKEND = Backend("metal", mx.fast.metal_kernel, METAL_PRELUDE)
LAUNCHER = Launcher(BACKEND)
why_not_here = BACKEND.why_not_here


def by_default() -> bool:
    """Whether `auto` takes this kernel here."""
    from .dispatch import OPERATION

    return OPERATION.default() == "metal"


def checks() -> Iterator[Check]:
    """Parity with the reference."""
    from .checks import checks_of

    return checks_of("metal")


def supports(request: Request) -> str | None:
    """None if this kernel can serve the request here, else the reason why not."""
    on_cpu = None if request.device == "gpu" else ON_CPU
    return on_cpu or why_not_here() or unsupported(request)
