"""Products of few rows inside a model: a block's rows by a kernel, all others as mlx-lm does.

Single layers get stand-ins that share their weights; layers that run as one product already are
told. Nothing is replaced unless a kernel is chosen.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from draftloom.kernel_settings import KernelSettings
from draftloom.kernels.few_rows import OPERATION, exchange

from .packed import PackedModel

__all__ = ["FewRows"]


class FewRows:
    """The plain layers of a model, and what stands in for them.

    Args:
        model: loaded. Nothing is changed before `tune`.
        packed: what of it runs as one product.
    """

    def __init__(self, model: nn.Module, packed: PackedModel) -> None:
        self._model = model
        self._packed = packed
        self._replaced: list[tuple[Any, str, nn.Module]] = []

    def tune(self, settings: KernelSettings) -> None:
        """Exchange the layers if the settings ask for a kernel; what was exchanged before is put
        back first. What is packed is packed before."""
        self.restore()
        use = OPERATION.wanted(settings.use(OPERATION.name))
        if use is None:
            return
        for one in self._packed.products:
            one.few_rows = use
        self._replaced = exchange(self._model, use)

    def restore(self) -> None:
        """Put every layer back."""
        for owner, name, layer in self._replaced:
            owner[name] = layer
        self._replaced.clear()
