"""speculators: `speculators_model_type`, with the network's keys in `transformer_layer_config`.

What differs from z-lab: `aux_hidden_state_layer_ids` counts what a layer is given, so that each is
one above the layer whose output is meant; the window of a sliding layer is counted from the anchor,
the same for every slot; `sliding_window_non_causal` says whether its slots see later ones. A
reduced vocabulary (`draft_vocab_size`) brings `lm_head.weight`, `t2d` and `d2t`. Values equal to
those of a default qwen3 config are left out of the file.

Source: speculators 0.9.0, its config classes and draft models.
"""

from __future__ import annotations

from typing import Any

from draftloom.checkpoint import DrafterDescription, WindowRule
from draftloom.errors import UnsupportedModelError
from draftloom.model_info import ModelInfo

from .reader import ConfigReader
from .zlab import dflash2

__all__ = ["NAME", "QWEN3_DEFAULTS", "read"]

NAME = "speculators"
SECTION = "transformer_layer_config"
SERVED = ("dflash", "dflash2", "dspark")
BOOKKEEPING = ("speculators_config", "speculators_version", "speculators_model_type")
QWEN3_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
"""transformers' Qwen3Config: a file holds what differs from it."""


def read(model: ModelInfo) -> DrafterDescription | None:
    """The description; None for a checkpoint of another format.

    Raises:
        ModelError: a key is missing, of no use, or not known; names it.
    """
    kind = model.config.get("speculators_model_type")
    if kind is None:
        return None
    if kind not in SERVED:
        raise UnsupportedModelError(
            f"{model.name}: speculators_model_type {kind!r} is not served",
            f"{', '.join(SERVED)} are",
        )
    layer = model.config.get(SECTION) or {}
    defaults = QWEN3_DEFAULTS if layer.get("model_type", "qwen3") == "qwen3" else {}
    reader = ConfigReader(model, NAME, ("", SECTION), defaults=defaults)
    for key in BOOKKEEPING:
        reader.get(key)
    fields = reader.network()
    fields["scales_table"] = True  # its embedding is the table alone, whatever the target
    fields["tap_layers"] = _taps(reader)
    fields["is_causal"] = _causal(reader, fields["layer_types"], kind)
    reduced = reader.whole("draft_vocab_size", 32000, least=1)
    fields["draft_vocab_size"] = None if reduced == fields["vocab_size"] else reduced
    fields["first_slot"] = _first_slot(reader, fields["block_size"], kind)
    hidden = reader.maybe_whole("target_hidden_size")
    if hidden not in (None, fields["hidden_size"]):
        hint = f"it must be the drafter's own hidden_size, {fields['hidden_size']}"
        raise reader.refuse("target_hidden_size", hidden, hint)
    added = {"drafter": kind}
    if kind == "dflash2":
        added = dflash2(reader)
    elif kind == "dspark":
        added |= reader.dspark_heads(True, with_markov_default=True)
    return DrafterDescription(
        **fields,
        **added,
        window_rule=WindowRule.BLOCK,
        ignored_tensors=("verifier_lm_head.*", "verifier_norm.*"),
        unread=reader.unread(),
    )


def _taps(reader: ConfigReader) -> tuple[int, ...]:
    """The layers whose outputs are meant: each id names the layer that is given it."""
    ids = reader.layers("aux_hidden_state_layer_ids")
    if min(ids) < 1:
        raise reader.refuse(
            "aux_hidden_state_layer_ids", list(ids), "0 is the embedding; layers count from 1 here"
        )
    return tuple(i - 1 for i in ids)


def _first_slot(reader: ConfigReader, block: int, kind: str) -> int:
    """By `sample_from_anchor`; in older files, which do not have it, by the number of tokens that
    the config proposes of a block."""
    proposed = _proposed(reader)
    if reader.get("sample_from_anchor") is None and proposed in (block, block - 1):
        return 0 if proposed == block else 1
    from_anchor = reader.flag("sample_from_anchor", kind == "dspark")
    if not from_anchor and proposed == block:
        raise reader.error(
            f"sample_from_anchor is false, speculators_config proposes {proposed} tokens of a "
            f"block of {block}",
            "without the anchor's slot a block proposes one token less than it has slots",
        )
    return 0 if from_anchor else 1


def _proposed(reader: ConfigReader) -> int | None:
    """`speculative_tokens` of the first proposal method; None where it is not said."""
    methods = (reader.get("speculators_config") or {}).get("proposal_methods") or [{}]
    tokens = methods[0].get("speculative_tokens")
    return tokens if isinstance(tokens, int) else None


def _causal(reader: ConfigReader, types: tuple[str, ...], kind: str) -> Any:
    """Full layers never are; sliding ones are unless the config says otherwise."""
    both_ways = reader.flag("sliding_window_non_causal", kind == "dflash2")
    return False if both_ways and "sliding_attention" in types else None
