"""Decoder layers whose residual additions run together with the norms behind them.

A stand-in takes the place of one layer. It calls the layer's own norms, mixer and MLP in mlx-lm's
order; each addition is one operation with the norm of what is added up, the second one with the
first norm of the layer that comes next. Nothing is replaced unless a kernel is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3, qwen3_5, qwen3_moe, qwen3_next

from draftloom.kernel_settings import KernelSettings
from draftloom.kernels.add_rms_norm import OPERATION, add_norm
from draftloom.kernels.stand_in import StandIn

__all__ = ["KNOWN_CLASSES", "ResidualLayers"]


def _self_attn(layer: Any) -> Any:
    return layer.self_attn


def _hybrid(layer: Any) -> Any:
    return layer.linear_attn if layer.is_linear else layer.self_attn


_MIXERS: dict[type, Callable[[Any], Any]] = {
    llama.TransformerBlock: _self_attn,
    qwen2.TransformerBlock: _self_attn,
    qwen3.TransformerBlock: _self_attn,
    qwen3_moe.Qwen3MoeDecoderLayer: _self_attn,
    qwen3_5.DecoderLayer: _hybrid,
    qwen3_next.Qwen3NextDecoderLayer: _hybrid,
}
KNOWN_CLASSES = tuple(_MIXERS)
"""Layers of mlx-lm that can be stood in for; exactly these, no subclasses."""


class _Handed:
    """What a layer leaves for the next one: the next one's first norm of what it is given."""

    def __init__(self) -> None:
        self._left: tuple[mx.array, Any, mx.array] | None = None

    def leave(self, x: mx.array, norm: Any, normed: mx.array) -> None:
        self._left = x, norm, normed

    def take(self, x: mx.array, norm: Any) -> mx.array:
        """norm(x), computed only if it was not left here."""
        left, self._left = self._left, None
        if left is not None and left[0] is x and left[1] is norm:
            return left[2]
        normed: mx.array = norm(x)
        return normed


class _ResidualLayer(StandIn):
    """Stands in for a decoder layer.

    Args:
        layer: of one of `KNOWN_CLASSES`.
        following: the layer after it; None for the last.
        handed: shared by the layers of a model.
        use: as `draftloom.kernels.add_rms_norm.add_norm`.
    """

    def __init__(self, layer: nn.Module, following: Any, handed: _Handed, use: Any) -> None:
        mixer = _MIXERS[type(layer)]
        super().__init__(layer, following=following, handed=handed, use=use, mixer=mixer)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        """Output [B, T, D] of inputs [B, T, D]."""
        layer: Any = self.layer
        normed = self._handed.take(x, layer.input_layernorm)
        mixed = self._mixer(layer)(normed, mask, cache)
        h, normed = add_norm(x, mixed, layer.post_attention_layernorm, use=self._use)
        more: mx.array = layer.mlp(normed)
        if self._following is None:
            return h + more
        norm = self._following.input_layernorm
        output, normed = add_norm(h, more, norm, use=self._use)
        self._handed.leave(output, norm, normed)
        return output


class ResidualLayers:
    """Puts stand-ins into a model's list of layers, and takes them out again. Other stand-ins for
    whole layers go on top: they are set after, and cleared before.

    Args:
        layers: the model's own list; None where its layers cannot be exchanged.
    """

    def __init__(self, layers: list[nn.Module] | None) -> None:
        self._layers = layers
        self._originals: list[nn.Module] = []

    def tune(self, settings: KernelSettings) -> None:
        """Exchange the layers if the settings ask for a kernel, and all are of classes known
        here; what was exchanged before is put back first."""
        self.restore()
        use = OPERATION.wanted(settings.use(OPERATION.name))
        layers = self._layers
        if use is None or not layers or any(type(layer) not in _MIXERS for layer in layers):
            return
        self._originals, handed = list(layers), _Handed()
        following = [*(after for _, after in pairwise(layers)), None]
        layers[:] = [
            _ResidualLayer(layer, after, handed, use)
            for layer, after in zip(self._originals, following, strict=True)
        ]

    def restore(self) -> None:
        """Put every layer back."""
        if self._layers is not None and self._originals:
            self._layers[:] = self._originals
        self._originals = []
