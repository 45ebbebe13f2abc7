"""DSpark: every key at the top level of a qwen3 config (or in `dspark_config`, `dflash_config`).

Recognised by an architecture with DSpark in its name, or by `dspark_config` or `markov_rank`.
`sample_from_anchor` says which slot predicts the first draft token: true, the default here, is the
anchor's own, so that a block of N slots proposes N tokens; false is the one after it, as in DFlash.

Source: config.json of public DSpark checkpoints.
"""

from __future__ import annotations

from draftloom.checkpoint import DrafterDescription
from draftloom.model_info import ModelInfo

from .reader import ConfigReader

__all__ = ["NAME", "read"]

NAME = "dspark"
SECTIONS = ("dspark_config", "dflash_config")
ARCHITECTURE = "DSpark"
BACKBONE = "qwen3"


def read(model: ModelInfo) -> DrafterDescription | None:
    """The description; None for a checkpoint of another format.

    Raises:
        ModelError: a key is missing, of no use, or not known; names it.
    """
    named = any(ARCHITECTURE in name for name in model.architectures)
    if not named and "dspark_config" not in model.config and "markov_rank" not in model.config:
        return None
    reader = ConfigReader(model, NAME, (*SECTIONS, ""), strict=SECTIONS)
    if model.model_type not in ("", BACKBONE):
        raise reader.refuse("model_type", model.model_type, f"a backbone of {BACKBONE} is")
    if reader.get("projector_type", NAME) != NAME:
        raise reader.refuse("projector_type", reader.get("projector_type"), f"{NAME} is")
    fields = reader.network()
    fields["tap_layers"] = reader.layers("target_layer_ids")
    fields["is_causal"] = reader.causal()
    reduced = reader.maybe_whole("draft_vocab_size", least=1)
    fields["draft_vocab_size"] = None if reduced == fields["vocab_size"] else reduced
    fields["first_slot"] = 0 if reader.flag("sample_from_anchor", True) else 1
    fields |= reader.dspark_heads(True, with_markov_default=True)
    return DrafterDescription(drafter="dspark", **fields, unread=reader.unread())
