"""z-lab: `dflash_config` beside the keys of a qwen3 model; older files keep some at the top level.

Recognised by `dflash_config`, or by architecture DFlashDraftModel or DFlash2DraftModel.

Source: config.json of the public z-lab checkpoints.
"""

from __future__ import annotations

from typing import Any

from draftloom.checkpoint import CandidateSelector, DrafterDescription, DynamicConvolution
from draftloom.model_info import ModelInfo

from .reader import ConfigReader

__all__ = ["NAME", "read"]

NAME = "z-lab"
SECTION = "dflash_config"
ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


def read(model: ModelInfo) -> DrafterDescription | None:
    """The description; None for a checkpoint of another format.

    Raises:
        ModelError: a key is missing, of no use, or not known; names it.
    """
    if SECTION not in model.config and not any(a in ARCHITECTURES for a in model.architectures):
        return None
    reader = ConfigReader(model, NAME, (SECTION, ""), strict=(SECTION,))
    fields = reader.network()
    fields["tap_layers"] = reader.layers("target_layer_ids")
    fields["is_causal"] = reader.causal()
    added = dflash2(reader) if is_dflash2(model) else {"drafter": "dflash"}
    return DrafterDescription(**fields, **added, unread=reader.unread())


def is_dflash2(model: ModelInfo) -> bool:
    """Whether the architecture, or a key that only it has, is DFlash 2's."""
    section = model.config.get(SECTION) or {}
    named = "DFlash2DraftModel" in model.architectures
    return named or any(section.get(key) or model.config.get(key) for key in DFLASH2_KEYS)


def dflash2(reader: ConfigReader) -> dict[str, Any]:
    """What a DFlash 2 config adds to a description.

    Raises:
        ModelError: a key is missing.
    """
    return {
        "drafter": "dflash2",
        "convolution": DynamicConvolution(
            kernel_size=reader.whole("conv_kernel_size", least=1),
            group_size=reader.whole("conv_group_size", least=1),
        ),
        "selector": CandidateSelector(
            rank=reader.whole("selector_rank", least=1),
            top_k=reader.whole("selector_top_k", least=1),
        ),
    }
