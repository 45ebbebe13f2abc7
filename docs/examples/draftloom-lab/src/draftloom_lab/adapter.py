"""An adapter for the Phi models (Phi-1, 1.5, 2), which mlx-lm loads as model type `phi`."""

from __future__ import annotations

import mlx.core as mx

from draftloom import ModelInfo, TargetInfo
from draftloom.adapters.base import MlxLmAdapter, describe_model


class PhiAdapter(MlxLmAdapter):
    """Attention in every layer, laid out as `MlxLmAdapter` expects; only the head differs."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether it is a Phi."""
        return model.model_type == "phi"

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config."""
        return describe_model(model, "lab.phi")[0]

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of normed hidden states [..., D]: Phi never ties its head."""
        return self.model.lm_head(hidden)
