"""DFlash and DSpark from their description, in plain float64 NumPy: no caches, no fused operations.

Everything is recomputed for every draft, from all features. Written from the paper (arXiv
2602.06036) and the config keys of the public checkpoints, not from the drafter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["DFlashReference", "DSparkReference"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


class DFlashReference:
    """A checkpoint's network.

    Args:
        config: config.json as z-lab writes it. Besides: `window_from_anchor`, whether a window is
            counted from the anchor; `first_slot`, the slot that predicts the first draft token.
        weights: tensors by their z-lab names; `embed_tokens.weight` and `lm_head.weight` go before
            the target's.

    Attributes:
        window: the last context positions that are kept at all; 0 is all of them.
        sinks: the first ones, which full layers keep beside those.
    """

    window = 0
    sinks = 0

    def __init__(self, config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        self.config = {**config, **config.get("dflash_config", {})}
        self.weights = {k: v.astype(np.float64) for k, v in weights.items()}

    def _get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def _frequencies(self) -> tuple[np.ndarray, float]:
        """Angular frequencies of the rotary embedding, and YaRN's factor on its output."""
        size = self.config["head_dim"]
        parameters = self._get("rope_parameters", {}) | (self._get("rope_scaling", {}))
        base = float(parameters.get("rope_theta") or self.config["rope_theta"])
        index = np.arange(size // 2)
        plain = base ** (-2 * index / size)
        if parameters.get("rope_type", parameters.get("type", "default")) != "yarn":
            return plain, 1.0
        factor, length = parameters["factor"], parameters["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(32)), 0)
        high = min(math.ceil(dimension(1)), size - 1)
        ramp = np.clip((index - low) / max(high - low, 1e-3), 0, 1)
        return plain * (1 - ramp) + plain / factor * ramp, 0.1 * math.log(factor) + 1

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rotate halves of [T, heads, size] at positions [T]."""
        frequencies, factor = self._frequencies()
        angle = positions[:, None, None] * frequencies
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        if self.config.get("rope_is_neox_style") is False:
            left, right = x[..., ::2], x[..., 1::2]
            turned = np.empty_like(x)
            turned[..., ::2], turned[..., 1::2] = left * cos - right * sin, right * cos + left * sin
            return turned
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def _visible(self, kind: str, context: int, tokens: int) -> np.ndarray:
        """[T, context + T] bool."""
        causal = self.config.get("is_causal")
        causal = kind == "sliding_attention" if causal is None else causal
        visible = np.zeros((tokens, context + tokens), dtype=bool)
        for i in range(tokens):
            for key in range(context + tokens):
                if key >= context:
                    visible[i, key] = not causal or key <= context + i
                elif kind == "sliding_attention" and self.config.get("window_from_anchor"):
                    visible[i, key] = key >= context - self.config["sliding_window"]
                elif kind == "sliding_attention":
                    visible[i, key] = context + i - key < self.config["sliding_window"]
                else:
                    visible[i, key] = True
                kept = not self.window or key >= context - self.window
                if kind == "full_attention":
                    kept = kept or key < self.sinks
                visible[i, key] &= kept
        return visible

    def _attention(self, i: int, kind: str, x: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Attention of layer i over features [C, D] and the normed block [T, D]."""
        config, name = self.config, f"layers.{i}.self_attn."
        weight, eps, size = self.weights, config["rms_norm_eps"], config["head_dim"]
        context, tokens = len(features), len(x)
        both = np.concatenate([features, x])
        q = (x @ weight[name + "q_proj.weight"].T).reshape(tokens, -1, size)
        k = (both @ weight[name + "k_proj.weight"].T).reshape(context + tokens, -1, size)
        v = (both @ weight[name + "v_proj.weight"].T).reshape(context + tokens, -1, size)
        positions = np.arange(context + tokens)
        q = self._rotate(rms_norm(q, weight[name + "q_norm.weight"], eps), positions[context:])
        k = self._rotate(rms_norm(k, weight[name + "k_norm.weight"], eps), positions)
        share = q.shape[1] // k.shape[1]
        visible, outputs = self._visible(kind, context, tokens), []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // share].T / math.sqrt(size)
            scores = np.where(visible, scores, -np.inf)
            odds = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(odds / odds.sum(-1, keepdims=True) @ v[:, head // share])
        return np.concatenate(outputs, axis=-1) @ weight[name + "o_proj.weight"].T

    def hidden(self, embeddings: np.ndarray, taps: np.ndarray) -> np.ndarray:
        """Normed hidden states [T, D] of a block's embeddings [T, D], over taps [C, F]."""
        config, weight = self.config, self.weights
        eps = config["rms_norm_eps"]
        features = rms_norm(taps @ weight["fc.weight"].T, weight["hidden_norm.weight"], eps)
        x = embeddings * self._get("input_embedding_scale", 1.0)
        layers = config["num_hidden_layers"]
        for i, kind in enumerate(self._get("layer_types", ["full_attention"] * layers)):
            name = f"layers.{i}."
            normed = rms_norm(x, weight[name + "input_layernorm.weight"], eps)
            x = x + self._attention(i, kind, normed, features)
            normed = rms_norm(x, weight[name + "post_attention_layernorm.weight"], eps)
            gate = normed @ weight[name + "mlp.gate_proj.weight"].T
            up = normed @ weight[name + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ weight[name + "mlp.down_proj.weight"].T
        return rms_norm(x, weight["norm.weight"], eps) * self._get("output_multiplier", 1.0)

    def slots(self, anchor: int, width: int, taps: np.ndarray, embedding: np.ndarray) -> np.ndarray:
        """Hidden states [width, D] of the slots that predict draft tokens."""
        first = self._get("first_slot", 1)
        block = [anchor] + [self.config["mask_token_id"]] * (width - 1 + first)
        own = self.weights.get("embed_tokens.weight", embedding)
        return self.hidden(own[block], taps)[first:]

    def logits(
        self, anchor: int, width: int, taps: np.ndarray, embedding: np.ndarray, head: np.ndarray
    ) -> np.ndarray:
        """Logits [width, V] of the draft slots, of fewer tokens where the head is its own.

        Args:
            anchor: the last committed token.
            width: draft slots.
            taps: [C, F] features of the tokens before the anchor.
            embedding, head: [V, D] of the target.
        """
        hidden = self.slots(anchor, width, taps, embedding)
        logits = hidden @ self.weights.get("lm_head.weight", head).T
        cap = self._get("final_logit_softcapping", None)
        return logits if cap is None else cap * np.tanh(logits / cap)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class DSparkReference(DFlashReference):
    """A DSpark checkpoint's network. `config` names `markov_head_type` and whether the confidence
    head reads the Markov row (`confidence_head_with_markov`)."""

    def _bias(self, row: np.ndarray, hidden: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Bias of a slot; the state is changed in place."""
        weight, kind = self.weights, self._get("markov_head_type", "vanilla")
        if kind == "gated":
            inner = np.concatenate([hidden, row])
            gate = weight["markov_head.gate_proj.weight"] @ inner
            row = row * sigmoid(gate + weight["markov_head.gate_proj.bias"])
        elif kind == "rnn":
            inner = np.concatenate([state, row, hidden])
            joint = weight["markov_head.joint_proj.weight"] @ inner
            joint = joint + weight["markov_head.joint_proj.bias"]
            gate, candidate, output = np.split(joint, 3)
            state[:] = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(candidate)
            row = np.tanh(output)
        return weight["markov_head.markov_w2.weight"] @ row

    def walk(
        self,
        base: np.ndarray,
        hidden: np.ndarray,
        previous: list[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits [K, draft vocabulary] and confidences [K] of a walk.

        Args:
            base: [K, draft vocabulary] from `logits`.
            hidden: [K, D] from `slots`.
            previous: the target's id before each slot: the anchor, then the drafted tokens.
        """
        weight, rows, confidences = self.weights, [], []
        rank = weight["markov_head.markov_w1.weight"].shape[1]
        state = np.zeros(rank)
        for logits, slot, token in zip(base, hidden, previous, strict=True):
            row = weight["markov_head.markov_w1.weight"][token]
            rows.append(logits + self._bias(row, slot, state))
            if "confidence_head.proj.weight" in weight:
                with_markov = self._get("confidence_head_with_markov", True)
                inner = np.concatenate([slot, row]) if with_markov else slot
                score = weight["confidence_head.proj.weight"][0] @ inner
                confidences.append(sigmoid(score + weight["confidence_head.proj.bias"][0]))
        return np.stack(rows), np.array(confidences)
