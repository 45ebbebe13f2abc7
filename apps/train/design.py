"""A drafter's config, by default from its target's: what is trained when nothing is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import TargetInfo
from draftloom.drafters.formats import describe_checkpoint
from draftloom.errors import UsageError
from draftloom.model_info import ModelInfo

__all__ = ["DrafterDesign", "default_taps", "design_drafter", "mask_token"]


@attrs.frozen(kw_only=True)
class DrafterDesign:
    """What of the drafter was asked for; None is the default that `design_drafter` describes.

    Attributes:
        layers: decoder layers.
        taps: target layers it reads.
        block_size: anchor and draft slots.
        heads, kv_heads, head_dim: attention.
        intermediate_size: of the MLP.
        sliding_window: W; all layers but the last are then sliding ones.
        mask_token: id in the draft slots.
    """

    layers: int | None = None
    taps: tuple[int, ...] | None = None
    block_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    sliding_window: int | None = None
    mask_token: int | None = None


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Evenly spaced layers l_i = round(1 + i (N-4)/(n-1)) with n = 5, or N // 2 of a target with
    fewer than 10 layers; below 6 layers all but the first.

    Source: arXiv 2602.06036.
    """
    if num_layers < 6:
        return tuple(range(1, num_layers)) or (0,)
    count = min(5, num_layers // 2)
    return tuple(round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count))


def mask_token(vocab_size: int, tokenizer: Any) -> int:
    """The id that stands in draft slots: the first one the tokenizer does not use; else its
    padding token, else its end of sequence, else the last id."""
    if tokenizer is None:
        return vocab_size - 1
    used = max(tokenizer.get_vocab().values(), default=-1)
    if used + 1 < vocab_size:
        return int(used + 1)
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and 0 <= value < vocab_size:
            return value
    return vocab_size - 1


def _attention(text: Any, design: DrafterDesign, hidden: int) -> tuple[int, int, int]:
    """Heads, key/value heads and head size: heads of 128 in a large target, as wide together as
    the target's; the target's own in a small one."""
    heads = int(text["num_attention_heads"])
    kv_heads = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or hidden // heads)
    wanted = design.head_dim or (128 if hidden >= 1024 else size)
    if heads * size % wanted == 0 and kv_heads * size % wanted == 0:
        heads, kv_heads = heads * size // wanted, kv_heads * size // wanted
    heads, kv_heads = design.heads or heads, design.kv_heads or kv_heads
    if heads % kv_heads or wanted % 2:
        raise UsageError(
            f"{heads} heads of size {wanted} cannot share {kv_heads} key/value heads",
            "heads must be a multiple of key/value heads, and their size even",
        )
    return heads, kv_heads, wanted


def design_drafter(
    model: ModelInfo, target: TargetInfo, tokenizer: Any, design: DrafterDesign
) -> dict[str, Any]:
    """config.json of a new drafter, in the z-lab layout.

    Five layers (N // 2 for a target with fewer than 10), block 16, taps as `default_taps`, the
    target's hidden size, MLP (3 x hidden where it has experts), rotary base and norm.

    Args:
        model: the target's config.
        target: its description.
        tokenizer: its tokenizer, or None.
        design: what was asked for.

    Raises:
        UsageError: a layer to tap that the target does not have, or numbers that do not fit.
    """
    text, hidden = model.text_config, target.hidden_size
    layers = design.layers or max(1, min(5, target.num_layers // 2))
    taps = design.taps or default_taps(target.num_layers)
    heads, kv_heads, size = _attention(text, design, hidden)
    mask = mask_token(target.vocab_size, tokenizer)
    mask = mask if design.mask_token is None else design.mask_token
    block = 16 if design.block_size is None else design.block_size
    _check(target, taps, block, mask)
    experts = text.get("num_experts") or text.get("num_local_experts")
    inner = None if experts else text.get("intermediate_size")
    rope = text.get("rope_parameters") or {}
    sliding = design.sliding_window
    kinds = ["full_attention" if sliding is None else "sliding_attention"] * layers
    kinds[-1] = "full_attention"
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": design.intermediate_size or int(inner or 3 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": float(text.get("rms_norm_eps") or 1e-6),
        "rope_theta": float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        "rope_scaling": None,
        "max_position_embeddings": target.context_limit or 32768,
        "layer_types": kinds,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_target_layers": target.num_layers,
        "block_size": block,
        "dflash_config": {"target_layer_ids": list(taps), "mask_token_id": mask},
        "dtype": "bfloat16",
    }
    if sliding is not None:
        config["sliding_window"] = sliding
    return config


def _check(target: TargetInfo, taps: Sequence[int], block: int, mask: int) -> None:
    if block < 2:
        raise UsageError(f"a block of {block} drafts nothing", "16 is usual, 2 is the least")
    outside = [tap for tap in taps if not 0 <= tap < target.num_layers]
    if outside or len(set(taps)) != len(taps):
        raise UsageError(
            f"taps {list(taps)} are not different layers of a target with {target.num_layers}",
            "the first layer is 0",
        )
    if not 0 <= mask < target.vocab_size:
        raise UsageError(f"mask token {mask} is outside the vocabulary of {target.vocab_size}")


def read_config(config: dict[str, Any], name: str) -> DrafterDescription:
    """The config as the drafter reads it."""
    return trainable(ModelInfo(name, None, config))


def trainable(model: ModelInfo) -> DrafterDescription:
    """The description of a checkpoint that can be trained.

    Raises:
        ModelError: its config cannot be read.
        UsageError: no DFlash drafter in the z-lab layout.
    """
    found = describe_checkpoint(model)
    if found is None or (found.format, found.drafter) != ("z-lab", "dflash"):
        kind = "no drafter" if found is None else f"of format {found.format} for {found.drafter!r}"
        raise UsageError(
            f"{model.name} is {kind}", "DFlash drafters in the z-lab layout can be trained"
        )
    return found


def load_init(checkpoint: Path, target: TargetInfo) -> dict[str, Any]:
    """config.json of a drafter to start from.

    Raises:
        ModelError: its config cannot be read.
        UsageError: it is no DFlash checkpoint in the z-lab layout, or does not fit the target.
    """
    model = ModelInfo.from_path(checkpoint)
    problems = list(trainable(model).problems(target))
    if problems:
        raise UsageError(f"--init {checkpoint}: {problems[0].message}", problems[0].hint)
    loaded: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    loaded.pop("quantization", None)
    loaded.pop("quantization_config", None)
    return loaded
