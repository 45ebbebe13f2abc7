"""Adapter for recurrent hybrids that record a tape: LFM2, the Mamba-2 hybrids, Kimi Linear."""

from __future__ import annotations

from typing import Any

import attrs
import mlx.nn as nn

from draftloom.contracts import CacheKind, TargetInfo
from draftloom.errors import UsageError
from draftloom.kernel_settings import KernelSettings
from draftloom.model_info import ModelInfo

from .generic import why_no_generic_taps
from .recurrent import RecordingConvolution, RecordingKimi, RecordingMamba
from .whole import WholeModelAdapter, describe_whole

__all__ = ["MODEL_TYPES", "RecurrentAdapter"]

_MIXERS: dict[str, tuple[str, Any]] = {
    "lfm2": ("conv", RecordingConvolution),
    "lfm2_moe": ("conv", RecordingConvolution),
    "nemotron_h": ("mixer", RecordingMamba),
    "mamba2": ("mixer", RecordingMamba),
    "granitemoehybrid": ("mamba", RecordingMamba),
    "falcon_h1": ("mamba", RecordingMamba),
    "kimi_linear": ("self_attn", RecordingKimi),
}
"""Where the layers of a model type keep their recurrent mixer, and what stands in for it."""
MODEL_TYPES = tuple(_MIXERS)


class RecurrentAdapter(WholeModelAdapter):
    """Serves hybrids whose recurrent layers record a tape; the rest of the forward is mlx-lm's."""

    def __init__(self, model: nn.Module, info: TargetInfo) -> None:
        super().__init__(model, info)
        name, stand = _MIXERS[info.model_type]
        self._name = name
        self._mixers: list[tuple[nn.Module, nn.Module]] = []
        recurrent = [layer for layer in self.model.layers if _is_recurrent(layer, name)]
        if any(isinstance(layer[name], stand) for layer in recurrent):
            raise UsageError(f"{info.name} is in use by another pipeline", "close that one first")
        for layer in recurrent:
            self._mixers.append((layer, layer[name]))
            layer[name] = stand(layer[name])

    def tune(self, settings: KernelSettings) -> None:
        """Choose the kernels of the recurrent layers; pack projections."""
        super().tune(settings)
        for layer, _ in self._mixers:
            layer[self._name].tune(settings)

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether the model type is one of `MODEL_TYPES`."""
        return model.model_type in MODEL_TYPES

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config."""
        info = describe_whole(model, "recurrent", why_no_generic_taps)
        kinds = tuple(
            kind for kind in (CacheKind.RECURRENT, CacheKind.OTHER) if kind in info.cache_kinds
        )
        return attrs.evolve(info, tape_kinds=kinds)

    def close(self) -> None:
        """Put every replaced layer and mixer back."""
        super().close()
        for layer, mixer in self._mixers:
            layer[self._name] = mixer
        self._mixers.clear()


def _is_recurrent(layer: Any, name: str) -> bool:
    """Whether a layer keeps a recurrent mixer under this name (others may keep attention there)."""
    mixer = layer.get(name)
    return mixer is not None and (
        isinstance(mixer, RecordingConvolution | RecordingKimi | RecordingMamba)
        or any(part in mixer for part in ("conv", "conv1d", "q_conv"))
    )
