"""The built-in formats, in the order they are asked."""

from __future__ import annotations

import attrs

from draftloom.checkpoint import DrafterDescription
from draftloom.model_info import ModelInfo

from . import dspark, specforge, speculators, zlab

__all__ = ["FORMATS", "describe_checkpoint"]

FORMATS = (speculators, specforge, dspark, zlab)
"""Each recognises its own: at most one of them answers, but for z-lab, whose layout SpecForge
shares and which is therefore asked last."""


def describe_checkpoint(model: ModelInfo) -> DrafterDescription | None:
    """What a drafter checkpoint of a built-in format is; None for any other model.

    Raises:
        ModelError: a key is missing, of no use, or changes what is computed in a way that is not
            known; names the key.
    """
    for module in FORMATS:
        description = module.read(model)
        if description is not None:
            return attrs.evolve(
                description,
                trained_context=model.trained_context,
                stated_length=model.stated_length,
            )
    return None
