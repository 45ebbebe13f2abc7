"""Layers whose products of few rows are a kernel's; they share the weights of others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .dispatch import product
from .launch import MOST_ROWS

__all__ = ["STANDS", "FewRowsEmbedding", "FewRowsLinear", "Stand", "exchange"]


class Stand(nn.Module):
    """Stands in for a layer; attributes it does not have itself come from there."""

    def __init__(self, layer: nn.Module, use: Any) -> None:
        super().__init__()
        self.layer = layer
        # Not through nn.Module's own setattr, which would look for parameters in it.
        object.__setattr__(self, "_use", use)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "layer" not in self:  # before the constructor has run
                raise
            return getattr(self["layer"], name)


class FewRowsLinear(Stand):
    """Stands in for a linear layer without a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., N] of x [..., D]."""
        layer = self["layer"]
        if 1 < x.size // x.shape[-1] <= MOST_ROWS:
            return product(x, layer.weight, use=self._use)
        output: mx.array = layer(x)
        return output


class FewRowsEmbedding(Stand):
    """Stands in for an embedding that is the head as well."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """The layer's own embeddings."""
        embeddings: mx.array = self["layer"](tokens)
        return embeddings

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits [..., V] of x [..., D]."""
        layer = self["layer"]
        if 1 < x.size // x.shape[-1] <= MOST_ROWS:
            return product(x, layer.weight, use=self._use)
        logits: mx.array = layer.as_linear(x)
        return logits


STANDS: dict[type, type[Stand]] = {nn.Linear: FewRowsLinear, nn.Embedding: FewRowsEmbedding}
"""What stands in for exactly these classes."""


def exchange(owner: Any, use: Any) -> list[tuple[Any, str, nn.Module]]:
    """Stand in for the layers that a module holds itself.

    Args:
        owner: the module.
        use: as `draftloom.kernels.few_rows.product`.

    Returns:
        (module, name, layer) of what was exchanged.
    """
    replaced = []
    for name in list(owner):
        layer = owner[name]
        stand = STANDS.get(type(layer))
        if stand is not None and "bias" not in layer:
            replaced.append((owner, name, layer))
            owner[name] = stand(layer, use)
    return replaced
