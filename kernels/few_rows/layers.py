"""Layers whose products of few rows are a kernel's; they share the weights of others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.kernels.stand_in import StandIn

from .dispatch import product
from .launch import MOST_ROWS

__all__ = ["STANDS", "FewRowsEmbedding", "FewRowsLinear", "exchange"]


class FewRowsLinear(StandIn):
    """Stands in for a linear layer without a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """[..., N] of x [..., D]."""
        layer = self["layer"]
        if 1 < x.size // x.shape[-1] <= MOST_ROWS:
            return product(x, layer.weight, use=self._use)
        output: mx.array = layer(x)
        return output


class FewRowsEmbedding(StandIn):
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


STANDS: dict[type, type[StandIn]] = {nn.Linear: FewRowsLinear, nn.Embedding: FewRowsEmbedding}
"""What stands in for exactly these classes."""


def exchange(model: nn.Module, use: Any) -> list[tuple[Any, str, nn.Module]]:
    """Stand in for the layers of a model, but for those that something stands in for already.

    Args:
        model: loaded.
        use: as `draftloom.kernels.few_rows.OPERATION.wanted` gives it.

    Returns:
        (module, name, layer) of what was exchanged.
    """
    replaced = []
    for _, owner in list(model.named_modules()):
        for name in [] if isinstance(owner, StandIn) else list(owner):
            layer = owner[name]
            stand = STANDS.get(type(layer))
            if stand is not None and "bias" not in layer:
                replaced.append((owner, name, layer))
                owner[name] = stand(layer, use=use)
    return replaced
