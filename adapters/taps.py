"""Hidden taps without touching a forward: a wrapper in place of single layers of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.kernels.stand_in import StandIn

__all__ = ["LayerTaps", "TapLayer"]


class TapLayer(StandIn):
    """Calls a decoder layer and keeps its output.

    Args:
        layer: the layer it stands for.
        index: the layer's number.
        outputs: where the output [B, T, D] goes, under the number.
    """

    def __init__(self, layer: nn.Module, index: int, outputs: dict[int, mx.array]) -> None:
        super().__init__(layer, index=index, outputs=outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        """The layer's own output."""
        output: mx.array = self.layer(*args, **kwargs)
        self._outputs[self._index] = output
        return output


class LayerTaps:
    """Puts taps into a model's list of layers, collects what they saw, takes them out again.

    Args:
        layers: the model's own list; its entries are exchanged in place.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._outputs: dict[int, mx.array] = {}
        self._originals: dict[int, nn.Module] = {}
        self._order: tuple[int, ...] = ()

    def set(self, layers: Sequence[int]) -> None:
        """Tap these layers and no others."""
        self.clear()
        self._order = tuple(layers)
        for index in set(layers):
            self._originals[index] = self._layers[index]
            self._layers[index] = TapLayer(self._layers[index], index, self._outputs)

    def clear(self) -> None:
        """Put every layer back."""
        for index, layer in self._originals.items():
            self._layers[index] = layer
        self._originals.clear()
        self._outputs.clear()
        self._order = ()

    def take(self) -> mx.array | None:
        """Features [B, T, F] of the last forward, layers in the order given to `set`; None
        without taps. The taps keep nothing."""
        if not self._order:
            return None
        features = mx.concatenate([self._outputs[i] for i in self._order], axis=-1)
        self._outputs.clear()
        return features
