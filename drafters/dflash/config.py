"""The config of a DFlash checkpoint in the z-lab layout, old and newer keys alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from draftloom.contracts import TargetInfo
from draftloom.errors import ModelError, Problem
from draftloom.model_info import ModelInfo

__all__ = ["ARCHITECTURES", "DFlashConfig", "is_dflash"]

ARCHITECTURES = ("DFlashDraftModel",)


def is_dflash(model: ModelInfo) -> bool:
    """Whether a checkpoint's config is that of a DFlash drafter."""
    return "dflash_config" in model.config or any(a in ARCHITECTURES for a in model.architectures)


@attrs.frozen
class DFlashConfig:
    """A DFlash drafter.

    Attributes:
        hidden_size: D, that of the target.
        intermediate_size: of the MLP.
        num_layers: decoder layers.
        num_heads, num_kv_heads, head_dim: attention.
        vocab_size: V, that of the target.
        rms_norm_eps: of every norm.
        rope_theta: base of the rotary embedding.
        rope_scaling: its scaling (``rope_type`` yarn, ...); None is plain.
        max_positions: positions it was made for.
        layer_types: ``full_attention`` or ``sliding_attention``, a layer.
        sliding_window: W of the sliding layers: context is seen iff query - key < W.
        is_causal: inside the block; None means sliding layers are and full layers are not.
        block_size: anchor and draft slots.
        mask_token_id: stands in the draft slots.
        tap_layers: target layers whose outputs are the features.
        num_target_layers: of the target it was trained for; None is not said.
        embedding_scale: factor on the target's embeddings.
        output_multiplier: factor on the hidden states before the head.
        softcap: c of c * tanh(logits / c); None is off.
        quantization: of stored weights, as mlx-lm writes it; None is plain.

    Source: config.json of the public z-lab checkpoints.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    max_positions: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    is_causal: bool | None
    block_size: int
    mask_token_id: int
    tap_layers: tuple[int, ...]
    num_target_layers: int | None
    embedding_scale: float
    output_multiplier: float
    softcap: float | None
    quantization: Mapping[str, Any] | None

    @classmethod
    def from_model(cls, model: ModelInfo) -> DFlashConfig:
        """Read a checkpoint's config.

        Raises:
            ModelError: not a DFlash config, or a key missing or of no use; names the key.
        """
        if not is_dflash(model):
            raise ModelError(
                f"{model.name} is not a DFlash checkpoint (architectures {model.architectures})",
                "an ordinary model drafts through the drafter 'autoregressive'",
            )
        read = _Reader(model)
        layers, heads = read.whole("num_hidden_layers"), read.whole("num_attention_heads")
        hidden = read.whole("hidden_size")
        theta, scaling = read.rope()
        types = read.get("layer_types") or ["full_attention"] * layers
        if len(types) != layers:
            raise ModelError(f"{model.name}: layer_types names {len(types)} layers, not {layers}")
        taps = read.get("target_layer_ids")
        if not taps or not all(isinstance(t, int) for t in taps):
            raise ModelError(f"{model.name}: config lacks dflash_config.target_layer_ids")
        return cls(
            hidden_size=hidden,
            intermediate_size=read.whole("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.whole("num_key_value_heads", heads),
            head_dim=read.whole("head_dim", hidden // heads),
            vocab_size=read.whole("vocab_size"),
            rms_norm_eps=float(read.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            max_positions=read.whole("max_position_embeddings", 32768),
            layer_types=tuple(types),
            sliding_window=read.get("sliding_window"),
            is_causal=read.get("is_causal"),
            block_size=read.whole("block_size"),
            mask_token_id=read.whole("mask_token_id"),
            tap_layers=tuple(taps),
            num_target_layers=read.get("num_target_layers"),
            embedding_scale=float(read.get("input_embedding_scale") or 1.0),
            output_multiplier=float(read.get("output_multiplier") or 1.0),
            softcap=read.get("final_logit_softcapping"),
            quantization=model.config.get("quantization"),
        )

    def problems(self, target: TargetInfo) -> Iterable[Problem]:
        """What does not fit the target."""
        hint = "is this the drafter of another target?"
        fits = {
            "vocab_size": (self.vocab_size, target.vocab_size),
            "hidden_size": (self.hidden_size, target.hidden_size),
            "num_target_layers": (self.num_target_layers, target.num_layers),
        }
        for key, (ours, theirs) in fits.items():
            if ours is not None and ours != theirs:
                message = f"the drafter was made for {key} {ours}, the target has {theirs}"
                yield Problem("dflash", message, hint)
        if not 0 <= self.mask_token_id < target.vocab_size:
            message = f"mask_token_id {self.mask_token_id} is outside the target's vocabulary"
            yield Problem("dflash", message, hint)


class _Reader:
    """Looks a key up at the top level and in `dflash_config`, where newer files keep some."""

    def __init__(self, model: ModelInfo) -> None:
        self._name = model.name
        self._config = {**model.config, **(model.config.get("dflash_config") or {})}

    def get(self, key: str, default: Any = None) -> Any:
        value = self._config.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self._name}: config lacks {key} (a whole number), got {value!r}")
        return value

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Base and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
        parameters = self.get("rope_parameters") or {}
        scaling = {**(self.get("rope_scaling") or {}), **parameters}
        theta = float(parameters.get("rope_theta") or self.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return theta, None
        return theta, {**scaling, "rope_type": kind, "type": kind}
