"""What of a loaded model kernels can stand in for: one set of switches for every adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.contracts import TargetInfo, TargetOutput
from draftloom.kernel_settings import KernelSettings

from .attention_module import AttentionLayers
from .compiled_pass import CompiledPass
from .early_launch import EarlyLaunch
from .few_rows import FewRows
from .packed import PackedModel
from .verify_attention import tune_attention

__all__ = ["TunedModel"]


class TunedModel(ABC):
    """The part of an adapter that exchanges instances of a model and puts them back.

    Attributes:
        attention: the attention modules that can be stood in for; mlx-lm's own run until some are.
        packed: the projections that can run as one product; apart until `tune` says otherwise.
        early: layers launched while later ones are put together; none until `tune` says so.
        few: layers whose products of few rows can be a kernel's; mlx-lm's own until `tune`.
        compiled: passes that are traced once and replayed; none until `tune` says so.
    """

    info: TargetInfo

    attention: AttentionLayers
    packed: PackedModel
    early: EarlyLaunch
    few: FewRows
    compiled: CompiledPass

    def _prepare(
        self, model: nn.Module, name: str, attending: Sequence[Any], layers: list[nn.Module] | None
    ) -> None:
        """Look at a model; nothing is exchanged yet.

        Args:
            model: as mlx-lm loaded it.
            name: for messages.
            attending: layers whose attention may be stood in for.
            layers: the model's own list; None where its layers cannot be exchanged.
        """
        self.attention = AttentionLayers(attending, name)
        self.packed = PackedModel(model)
        self.early = EarlyLaunch(layers)
        self.few = FewRows(model, self.packed)
        self.compiled = CompiledPass(model, name)

    def tune(self, settings: KernelSettings) -> None:
        """Pack projections, launch layers early, choose the attention of verify, compile passes,
        as the settings say. Taps are set after."""
        self.few.restore()
        self.packed.tune(settings)
        self.few.tune(settings)
        self.early.tune(settings)
        tune_attention(self.attention, settings)
        self.compiled.tune(settings, self.info)

    def forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        """Logits [B, T, V] and features [B, T, F] of tokens [B, T] int32."""
        self.compiled.try_out(self._forward, self.make_cache)
        output = self.compiled.run(self._forward, tokens, cache)
        return self._forward(tokens, cache) if output is None else output

    @property
    def traces(self) -> bool:
        """Whether passes are traced, so that a length seen before costs less than a new one."""
        return not self.compiled.why_not

    @abstractmethod
    def make_cache(self) -> list[Any]:
        """Fresh caches, as mlx-lm makes them."""

    @abstractmethod
    def _forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        """The pass as it is."""

    def _put_back(self) -> None:
        """Put every attention module, projection and layer back. Taps are cleared before."""
        self.compiled.clear()
        self.attention.restore()
        self.few.restore()
        self.packed.restore()
        self.early.restore()
