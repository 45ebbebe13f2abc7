"""Adapter of last resort: any language model that mlx-lm can load and nobody else claims.

Its caches go back by what their kind allows, otherwise by snapshot. Hidden states are offered
only where the model shows, run once without weights, that they can be taken; a family that others
rely on belongs in an adapter whose tests compare it with mlx-lm.
"""

from __future__ import annotations

import importlib.util

import mlx.nn as nn
from mlx_lm.utils import MODEL_REMAPPING

from draftloom.contracts import TargetInfo
from draftloom.errors import UnsupportedModelError
from draftloom.model_info import ModelInfo

from .parts import Parts, why_no_taps
from .whole import WholeModelAdapter, describe_whole

__all__ = ["REFUSED", "GenericAdapter", "why_no_generic_taps"]

REFUSED = {
    "dbrx": "its forward reads values on the host in every layer, so that it cannot be looked at "
    "without weights",
    "muse_spark": "its forward reads values on the host",
    "prism_hadamard_qwen35": "its forward reads values on the host",
}
"""Model types of mlx-lm that cannot be served so, and why."""


class GenericAdapter(WholeModelAdapter):
    """Serves what mlx-lm can load; asked last."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        """Whether mlx-lm has a module for the model type."""
        name = MODEL_REMAPPING.get(model.model_type, model.model_type)
        usable = name.replace("_", "").replace("-", "").isalnum()
        return usable and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None

    @classmethod
    def describe(cls, model: ModelInfo) -> TargetInfo:
        """What the target is, from its config.

        Raises:
            UnsupportedModelError: a model that cannot be served; says why.
        """
        if reason := REFUSED.get(model.model_type):
            raise UnsupportedModelError(
                f"model type {model.model_type!r} of {model.name} cannot be served: {reason}",
                "docs/how-to/write-an-adapter.md shows how to serve it; asked: generic",
            )
        return describe_whole(model, "generic", why_no_generic_taps)


def why_no_generic_taps(skeleton: nn.Module, parts: Parts | None, hidden_size: int) -> str:
    """As `why_no_taps`; embeddings that depend on more than the token are refused too."""
    if parts is not None:
        tables = [m for m in parts.owners[-1].children().values() if isinstance(m, nn.Embedding)]
        if len(tables) != 1:
            return "its embeddings depend on more than the token"
    return why_no_taps(skeleton, parts, hidden_size)
