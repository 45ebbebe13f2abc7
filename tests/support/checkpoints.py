"""One drafter, written by hand in every checkpoint format.

`Golden` says what a drafter computes. Each format's function writes it the way that format's
description says; what the drafter then reads out of the files must compute what the reference,
which never sees the files, computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import numpy as np

from tests.support.dflash2_numpy import DFlash2Reference
from tests.support.dflash_numpy import DFlashReference, DSparkReference
from tests.support.pipelines import dflash_weights

__all__ = ["FORMATS", "Golden", "rewrite", "write"]

QWEN3_HEAD_DIM = 128


@attrs.frozen(kw_only=True)
class Golden:
    """What a drafter is.

    Attributes:
        hidden, vocab, taps: of its target; taps are layers whose outputs it reads.
        config: network keys as a qwen3 config has them.
        block: slots.
        first_slot: slot that predicts the first draft token.
        causal: inside the block; None is by layer.
        from_anchor: whether the window is counted from the anchor.
        scale, multiplier, softcap: of embeddings, of hidden states, of logits.
        draft_ids: target ids of a reduced vocabulary; None is all.
        own: embedding and head of its own, of ``embed_tokens`` and ``lm_head``.
        markov: kind of the Markov head; "" is none.
        rank: of it.
        confidence: whether its input has the Markov row; None is no confidence head.
        convolution: kernel size and group size of a DFlash 2 drafter; None is no such drafter.
        selector: rank and top_k of it.
        seed: of the weights.
    """

    hidden: int = 32
    vocab: int = 40
    taps: tuple[int, ...] = (1, 3, 4)
    config: dict[str, Any] = attrs.Factory(dict)
    block: int = 8
    first_slot: int = 1
    causal: bool | None = None
    from_anchor: bool = False
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    draft_ids: tuple[int, ...] | None = None
    own: tuple[str, ...] = ()
    markov: str = ""
    rank: int = 6
    confidence: bool | None = None
    convolution: tuple[int, int] | None = None
    selector: tuple[int, int] = (6, 4)
    seed: int = 0

    @property
    def network(self) -> dict[str, Any]:
        """Keys of the decoder, in the words of a qwen3 config."""
        return {
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            **self.config,
        }

    @property
    def mask(self) -> int:
        """The token in the slots after the anchor's."""
        return self.vocab - 1

    @property
    def words(self) -> int:
        """Tokens it can propose."""
        return self.vocab if self.draft_ids is None else len(self.draft_ids)

    def weights(self) -> dict[str, np.ndarray]:
        """Tensors by their z-lab names."""
        rng = np.random.default_rng(self.seed)
        found = dflash_weights(self.network, len(self.taps), rng)
        shapes: dict[str, tuple[int, ...]] = {}
        if "embed_tokens" in self.own:
            shapes["embed_tokens.weight"] = (self.vocab, self.hidden)
        if "lm_head" in self.own or self.draft_ids is not None:
            shapes["lm_head.weight"] = (self.words, self.hidden)
        if self.markov:
            shapes["markov_head.markov_w1.weight"] = (self.vocab, self.rank)
            shapes["markov_head.markov_w2.weight"] = (self.words, self.rank)
        inner = self.hidden + self.rank
        if self.markov == "gated":
            shapes["markov_head.gate_proj.weight"] = (self.rank, inner)
            shapes["markov_head.gate_proj.bias"] = (self.rank,)
        if self.markov == "rnn":
            shapes["markov_head.joint_proj.weight"] = (3 * self.rank, inner + self.rank)
            shapes["markov_head.joint_proj.bias"] = (3 * self.rank,)
        if self.confidence is not None:
            inputs = self.hidden + self.rank * self.confidence
            shapes["confidence_head.proj.weight"] = (1, inputs)
            shapes["confidence_head.proj.bias"] = (1,)
        if self.convolution is not None:
            shapes |= self._dflash2_shapes(*self.convolution, self.selector[0])
        for name, shape in shapes.items():
            whole = ("markov_w1", "embed", "codebook")
            size = 1.0 if any(part in name for part in whole) else shape[-1] ** -0.5
            if "base_kernel" in name:
                size = 0.5
            found[name] = (1.5 * size * rng.standard_normal(shape)).astype(np.float32)
        return found

    def _dflash2_shapes(self, kernel: int, group: int, rank: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.network["num_hidden_layers"]):
            for name in (f"layers.{i}.attention_conv.", f"layers.{i}.mlp_conv."):
                shapes[name + "base_kernel"] = (2, kernel, self.hidden)
                rows = 2 * kernel * self.hidden // group
                shapes[name + "kernel_projection.weight"] = (rows, self.hidden)
        name = "candidate_selector."
        shapes[name + "hidden_projection.weight"] = (rank, self.hidden)
        shapes[name + "predecessor_codebook"] = (self.vocab, rank)
        shapes[name + "successor_codebook"] = (self.vocab, rank)
        return shapes

    @property
    def dflash2(self) -> dict[str, int]:
        """Keys that only a DFlash 2 config has; none for others."""
        if self.convolution is None:
            return {}
        return {
            "conv_kernel_size": self.convolution[0],
            "conv_group_size": self.convolution[1],
            "selector_rank": self.selector[0],
            "selector_top_k": self.selector[1],
        }

    def reference(self) -> DFlashReference:
        """What must come out."""
        config = {
            **self.network,
            "mask_token_id": self.mask,
            "is_causal": self.causal,
            "window_from_anchor": self.from_anchor,
            "first_slot": self.first_slot,
            "input_embedding_scale": self.scale,
            "output_multiplier": self.multiplier,
            "final_logit_softcapping": self.softcap,
            "markov_head_type": self.markov,
            "confidence_head_with_markov": self.confidence,
            **self.dflash2,
        }
        if self.convolution is not None:
            return DFlash2Reference(config, self.weights())
        kind = DSparkReference if self.markov else DFlashReference
        return kind(config, self.weights())


Files = tuple[dict[str, Any], dict[str, np.ndarray]]


def _zlab_old(golden: Golden) -> Files:
    """Everything but taps and mask at the top level."""
    assert golden.first_slot == 1
    assert not golden.from_anchor
    config = {
        **golden.network,
        "architectures": ["DFlashDraftModel"],
        "block_size": golden.block,
        "dflash_config": {"mask_token_id": golden.mask, "target_layer_ids": list(golden.taps)},
    }
    if golden.causal is not None:
        config["is_causal"] = golden.causal
    return config, golden.weights()


def _zlab_new(golden: Golden) -> Files:
    """`dflash_config` has all of its own, the rotary embedding is one group."""
    config, weights = _zlab_old(golden)
    del config["block_size"]
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling", None)
    config["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    config["dflash_config"] |= {
        "block_size": golden.block,
        "input_embedding_scale": golden.scale,
        "output_multiplier": golden.multiplier,
        "final_logit_softcapping": golden.softcap,
        **golden.dflash2,
    }
    if golden.convolution is not None:
        config["architectures"] = ["DFlash2DraftModel"]
    return config, weights


def _specforge(golden: Golden) -> Files:
    """The legacy z-lab layout with a projector; early files keep the heads under `logit_head`."""
    config, weights = _zlab_old(attrs.evolve(golden, first_slot=1))
    assert golden.first_slot == (0 if golden.markov else 1), "labels of slot k: k + 1, and k"
    inner = config["dflash_config"]
    inner |= {"projector_type": "dflash", "shift_label": False, "pure_draft_prefix_len": 0}
    if golden.markov:
        config["architectures"] = ["DSparkDraftModel"]
        inner |= {
            "projector_type": "dspark",
            "attention_mode": "gqa",
            "markov_rank": golden.rank,
            "markov_head_type": golden.markov,
            "confidence_head_alpha": 0.0 if golden.confidence is None else 1.0,
            "confidence_head_with_markov": bool(golden.confidence),
        }
        heads = ("markov_head.", "confidence_head.")
        weights = {"logit_head." * n.startswith(heads) + n: w for n, w in weights.items()}
    return config, weights


def _dspark(golden: Golden) -> Files:
    """Every key at the top level."""
    config = {
        **golden.network,
        "architectures": ["Qwen3DSparkModel"],
        "attention_bias": False,
        "num_anchors": 512,
        "block_size": golden.block,
        "mask_token_id": golden.mask,
        "target_layer_ids": list(golden.taps),
        "markov_rank": golden.rank,
        "markov_head_type": golden.markov,
        "enable_confidence_head": golden.confidence is not None,
        "confidence_head_with_markov": bool(golden.confidence),
        "final_logit_softcapping": golden.softcap,
    }
    if golden.causal:
        config["dflash_query_causal"] = True
    if golden.first_slot:  # the anchor's own slot predicts unless the file says otherwise
        config["sample_from_anchor"] = False
    weights = golden.weights()
    if golden.draft_ids is not None:
        config["draft_vocab_size"] = golden.words
        weights["d2t"] = _offsets(golden)
    return config, weights


def _offsets(golden: Golden) -> np.ndarray:
    assert golden.draft_ids is not None
    return np.array([t - i for i, t in enumerate(golden.draft_ids)], dtype=np.int64)


def _speculators(golden: Golden) -> Files:
    """Taps count what a layer is given; the window is counted from the anchor; what a default qwen3
    config has is left out."""
    layer = {k: v for k, v in golden.network.items() if (k, v) != ("head_dim", QWEN3_HEAD_DIM)}
    sliding = "sliding_attention" in (layer.get("layer_types") or ())
    assert golden.from_anchor or not sliding
    theta, scaling = layer.pop("rope_theta"), layer.pop("rope_scaling", None)
    if scaling is not None or theta != 10000.0:
        layer["rope_parameters"] = {**(scaling or {}), "rope_theta": theta}
    kind = "dspark" if golden.markov else "dflash2" if golden.dflash2 else "dflash"
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "a/target"}},
        "transformer_layer_config": layer,
        "draft_vocab_size": golden.words,
        "block_size": golden.block,
        "mask_token_id": golden.mask,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": [tap + 1 for tap in golden.taps],
        "sliding_window_non_causal": sliding and golden.causal is False,
        **golden.dflash2,
    }
    if golden.first_slot != (0 if kind == "dspark" else 1):
        config["sample_from_anchor"] = golden.first_slot == 0
    if golden.markov:
        config |= {
            "markov_rank": golden.rank,
            "markov_head_type": golden.markov,
            "enable_confidence_head": golden.confidence is not None,
            "confidence_head_with_markov": bool(golden.confidence),
        }
    weights = golden.weights()
    weights["verifier_norm.weight"] = np.ones(golden.hidden, dtype=np.float32)
    if golden.draft_ids is not None:
        weights["d2t"] = _offsets(golden)
        weights["t2d"] = np.isin(np.arange(golden.vocab), golden.draft_ids)
    return config, weights


FORMATS: dict[str, Callable[[Golden], Files]] = {
    "z-lab-old": _zlab_old,
    "z-lab-new": _zlab_new,
    "specforge": _specforge,
    "dspark": _dspark,
    "speculators": _speculators,
}


def write(folder: Path, form: str, golden: Golden) -> Path:
    """Write a checkpoint folder in a format."""
    config, weights = FORMATS[form](golden)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def rewrite(
    folder: Path,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
    tensors: Callable[[dict[str, mx.array]], Any] = lambda tensors: None,
) -> Path:
    """Change the files of a checkpoint in place."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config(settings)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    tensors(arrays)
    mx.eval(arrays)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder
