"""Reads config keys, and keeps account of those that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from draftloom.checkpoint import ConfidenceHead, MarkovHead
from draftloom.errors import ModelError, UnsupportedModelError
from draftloom.model_info import ModelInfo

__all__ = ["ConfigReader"]

WITHOUT_EFFECT = frozenset(
    (
        *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "name_or_path"),
        *("_name_or_path", "_commit_hash", "_attn_implementation", "transformers_version"),
        *("initializer_range", "use_cache", "attention_dropout", "return_dict", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "id2label"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "label2id"),
        *("max_window_layers", "use_sliding_window", "is_encoder_decoder", "pretraining_tp"),
        *("num_anchors", "loss_decay_gamma", "draftloom", "has_lm_head", "has_own_embed"),
    )
)
"""Keys that change nothing of what a drafter computes: book-keeping, and what training used."""
MARKOV_KINDS = ("vanilla", "gated", "rnn")
FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swiglu"),
    "use_sinks": (False,),
    "attention_sink_bias": (False,),
    "log_snr_conditioning": (False,),
    "enable_qwen35_gated_q_proj": (False,),
}
"""Keys that drafters can only serve at these values."""


class ConfigReader:
    """Looks a key up in sections of a config, the first one that has it wins.

    Args:
        model: the checkpoint.
        format_name: for messages and the description.
        sections: parts of the config by their key; "" is the top level.
        strict: sections whose keys all change what a drafter computes: an unknown one is an error.
        defaults: values of keys that a format leaves out of the file.
    """

    def __init__(
        self,
        model: ModelInfo,
        format_name: str,
        sections: Iterable[str] = ("",),
        strict: Iterable[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.format = model, format_name
        self._where = str(model.path / "config.json") if model.path is not None else model.name
        self._sections = {name: self._section(name) for name in sections}
        self._strict = frozenset(strict)
        self._defaults = defaults or {}
        self._read: set[str] = set(self._sections)

    def _section(self, name: str) -> Mapping[str, Any]:
        value = self.model.config if not name else self.model.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise ModelError(f"{self._where}: {name} is not an object, got {value!r}")
        return value

    def error(self, message: str, hint: str = "") -> ModelError:
        """An error that names the file."""
        return ModelError(f"{self._where}: {message}", hint)

    def refuse(self, key: str, value: Any, hint: str) -> ModelError:
        """An error for a key whose value no drafter here serves."""
        return UnsupportedModelError(f"{self._where}: {key} {value!r} is not served", hint)

    # --- values ------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        """The value; where the key is absent or null the format's default, else this one."""
        self._read.add(key)
        for section in self._sections.values():
            if section.get(key) is not None:
                return section[key]
        return self._defaults.get(key, default)

    def whole(self, key: str, default: int | None = None, least: int = 0) -> int:
        """A whole number of at least `least`.

        Raises:
            ModelError: the key is missing or something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"config lacks {key} (a whole number), got {value!r}")
        return value

    def maybe_whole(self, key: str, least: int = 0) -> int | None:
        """A whole number, or None where the key is absent."""
        return None if self.get(key) is None else self.whole(key, least=least)

    def number(self, key: str, default: float) -> float:
        """A number.

        Raises:
            ModelError: something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} must be a number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ModelError: something else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {value!r}")
        return value

    def maybe_flag(self, key: str) -> bool | None:
        """True or false, or None where the key is absent."""
        return None if self.get(key) is None else self.flag(key, False)

    def layers(self, key: str) -> tuple[int, ...]:
        """Layer numbers, at least one.

        Raises:
            ModelError: none, or something else.
        """
        value = self.get(key)
        whole = isinstance(value, list | tuple) and value
        if not whole or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise self.error(f"config lacks {key} (a list of layer numbers), got {value!r}")
        return tuple(value)

    # --- groups of keys ----------------------------------------------------------------------

    def rope(self) -> tuple[float, Mapping[str, Any] | None]:
        """Base and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
        parameters = self.get("rope_parameters") or {}
        scaling = {**(self.get("rope_scaling") or {}), **parameters}
        theta = float(parameters.get("rope_theta") or self.get("rope_theta") or 10000.0)
        self._read.add("rope_theta")
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return theta, None
        return theta, {**scaling, "rope_type": kind, "type": kind}

    def network(self) -> dict[str, Any]:
        """The decoder's part of a description: sizes, rotary embedding, layers and window.

        Raises:
            ModelError: a key is missing or of no use.
        """
        layers, heads = self.whole("num_hidden_layers", least=1), self.whole("num_attention_heads")
        hidden = self.whole("hidden_size", least=1)
        theta, scaling = self.rope()
        types = tuple(self.get("layer_types") or ["full_attention"] * layers)
        if len(types) != layers:
            raise self.error(f"layer_types names {len(types)} layers, not {layers}")
        unknown = sorted({*types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise self.refuse("layer_types", unknown[0], "full_attention or sliding_attention")
        window = self.maybe_whole("sliding_window", least=1)
        if window is None and "sliding_attention" in types:
            raise self.error("layer_types has sliding layers, config lacks sliding_window")
        softcap = self.get("final_logit_softcapping")
        return {
            "name": self.model.name,
            "path": self.model.path,
            "format": self.format,
            "hidden_size": hidden,
            "intermediate_size": self.whole("intermediate_size", least=1),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", heads, least=1),
            "head_dim": self.whole("head_dim", hidden // max(heads, 1), least=1),
            "vocab_size": self.whole("vocab_size", least=1),
            "rms_norm_eps": self.number("rms_norm_eps", 1e-6),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_interleaved": not self.flag("rope_is_neox_style", True),
            "max_positions": self.whole("max_position_embeddings", 32768, least=1),
            "layer_types": types,
            "sliding_window": window,
            "block_size": self.whole("block_size", least=1),
            "mask_token_id": self.whole("mask_token_id"),
            "num_target_layers": self.maybe_whole("num_target_layers"),
            "embedding_scale": self.number("input_embedding_scale", 1.0) or 1.0,
            "scales_table": self.get("input_embedding_scale") is not None,
            "output_multiplier": self.number("output_multiplier", 1.0) or 1.0,
            "softcap": None if softcap is None else self.number("final_logit_softcapping", 0.0),
            "quantization": self._quantization(),
            "dtype": self._dtype(),
        }

    def _dtype(self) -> str | None:
        """`dtype`, in older files `torch_dtype`; None for what is no floating type."""
        said = str(self.get("dtype") or self.get("torch_dtype") or "").removeprefix("torch.")
        return said if said in ("float32", "bfloat16", "float16") else None

    def _quantization(self) -> Mapping[str, Any] | None:
        """mlx-lm's own. Weights packed by others would be read as something else."""
        plain, other = self.get("quantization"), self.get("quantization_config")
        if plain is None and other is not None and "bits" in other and "group_size" in other:
            plain = None if "quant_method" in other else other
        if plain is None and other is not None:
            method = other.get("quant_method", "unknown") if isinstance(other, Mapping) else other
            raise self.refuse(
                "quantization_config", method, "plain weights, or packed ones as mlx-lm writes them"
            )
        return plain  # type: ignore[no-any-return]

    def dspark_heads(self, confidence_default: bool, with_markov_default: bool) -> dict[str, Any]:
        """Markov and confidence head of a description.

        Raises:
            ModelError: a key is of no use, or a kind of head that is not served.
        """
        rank = self.whole("markov_rank", 256)
        kind = self.get("markov_head_type", "vanilla")
        if rank and kind not in MARKOV_KINDS:
            raise self.refuse("markov_head_type", kind, f"{', '.join(MARKOV_KINDS)} are")
        confident = self.flag("enable_confidence_head", confidence_default)
        with_markov = self.flag("confidence_head_with_markov", with_markov_default and rank > 0)
        if confident and with_markov and not rank:
            raise self.error("confidence_head_with_markov needs a markov_rank above 0")
        return {
            "markov": MarkovHead(rank, kind) if rank else None,
            "confidence": ConfidenceHead(with_markov) if confident else None,
        }

    def causal(self) -> bool | None:
        """Whether a block is causal, by the keys that any layout says it with; None is by layer.

        Raises:
            ModelError: something else than true or false.
        """
        for key in ("dflash_query_causal", "causal"):
            if self.flag(key, False):
                return True
        return self.maybe_flag("is_causal")

    # --- account -----------------------------------------------------------------------------

    def unread(self) -> tuple[str, ...]:
        """Keys that nobody asked for and that are not known to have no effect.

        Raises:
            ModelError: one that changes what a drafter computes.
        """
        for key, served in FIXED.items():
            value = self.get(key)
            if value is not None and value not in served:
                raise self.refuse(key, value, f"{key} {served[0]!r} is")
        left = []
        for name, section in self._sections.items():
            for key, value in section.items():
                if key in self._read or key in WITHOUT_EFFECT:
                    continue
                full = f"{name}.{key}" if name else key
                if name in self._strict and value not in (None, False, 0, "", [], {}):
                    raise self.error(
                        f"{full} = {value!r} is not known to format {self.format}",
                        "it may change what the drafter computes; a newer draftloom or a plugin "
                        "may read it",
                    )
                left.append(full)
        return tuple(left)
