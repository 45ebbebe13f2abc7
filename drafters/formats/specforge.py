"""SpecForge: the legacy z-lab layout with a projector on top.

Recognised by `dflash_config` with `projector_type`, `shift_label` or `pure_draft_prefix_len`, or by
architecture DSparkDraftModel or DominoDraftModel.

Source: SpecForge 0.2.0, its draft models and their configs.
"""

from __future__ import annotations

from draftloom.checkpoint import DrafterDescription
from draftloom.model_info import ModelInfo

from .reader import ConfigReader

__all__ = ["NAME", "read"]

NAME = "specforge"
SECTION = "dflash_config"
OWN_KEYS = ("projector_type", "shift_label", "pure_draft_prefix_len")
PROJECTORS = {"DSparkDraftModel": "dspark", "DominoDraftModel": "domino"}
DOMINO = "labels are shifted by the domino projector alone, which is not served"


def read(model: ModelInfo) -> DrafterDescription | None:
    """The description; None for a checkpoint of another format.

    Raises:
        ModelError: a key is missing, of no use, or asks for what no drafter does; names it.
    """
    section = model.config.get(SECTION) or {}
    named = [PROJECTORS[a] for a in model.architectures if a in PROJECTORS]
    if not named and not any(key in section for key in OWN_KEYS):
        return None
    reader = ConfigReader(model, NAME, (SECTION, ""), strict=(SECTION,))
    projector = reader.get("projector_type", named[0] if named else "dflash")
    if projector not in ("dflash", "dspark"):
        raise reader.refuse("projector_type", projector, "dflash and dspark are")
    if reader.flag("shift_label", False):
        raise reader.refuse("shift_label", True, DOMINO)
    if reader.whole("pure_draft_prefix_len", 0):
        raise reader.refuse("pure_draft_prefix_len", reader.get("pure_draft_prefix_len"), DOMINO)
    fields = reader.network()
    fields["tap_layers"] = reader.layers("target_layer_ids")
    fields["is_causal"] = reader.causal()
    if projector == "dspark":
        reader.get("attention_mode")  # says once more how many key/value heads there are
        alpha = reader.number("confidence_head_alpha", 0.0)
        fields |= reader.dspark_heads(alpha > 0, with_markov_default=False)
        # Trained so: the label of slot k is the token k + 1 after the anchor.
        fields["first_slot"] = 0 if reader.flag("sample_from_anchor", True) else 1
        fields["renames"] = (("logit_head.", ""),)
    return DrafterDescription(drafter=projector, **fields, unread=reader.unread())
