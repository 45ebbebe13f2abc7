"""DFlash 2 from its description, in plain float64 NumPy: every sum as it is written."""

from __future__ import annotations

import numpy as np

from tests.support.dflash_numpy import DFlashReference, rms_norm

__all__ = ["DFlash2Reference"]


class DFlash2Reference(DFlashReference):
    """A DFlash 2 checkpoint's network. `config` names `conv_kernel_size`, `conv_group_size` and
    `selector_top_k`."""

    def _convolve(self, name: str, side: int, x: np.ndarray, normed: np.ndarray) -> np.ndarray:
        """out[i,c] = sum_{t<k} (base[side,t,c] + delta[i,side,t,c // g]) x[i-t,c]."""
        taps, group = self.config["conv_kernel_size"], self.config["conv_group_size"]
        tokens, size = x.shape
        base = self.weights[name + "base_kernel"]
        projected = normed @ self.weights[name + "kernel_projection.weight"].T
        delta = projected.reshape(tokens, 2, taps, size // group)
        out = np.zeros_like(x)
        for i in range(tokens):
            for t in range(taps):
                if i - t < 0:
                    continue
                for c in range(size):
                    out[i, c] += (base[side, t, c] + delta[i, side, t, c // group]) * x[i - t, c]
        return out

    def hidden(self, embeddings: np.ndarray, taps: np.ndarray) -> np.ndarray:
        """Normed hidden states [T, D] of a block's embeddings [T, D], over taps [C, F]."""
        config, weight = self.config, self.weights
        eps = config["rms_norm_eps"]
        features = rms_norm(taps @ weight["fc.weight"].T, weight["hidden_norm.weight"], eps)
        x = embeddings * self._get("input_embedding_scale", 1.0)
        layers = config["num_hidden_layers"]
        for i, kind in enumerate(self._get("layer_types", ["full_attention"] * layers)):
            name = f"layers.{i}."
            conv = name + "attention_conv."
            normed = rms_norm(x, weight[name + "input_layernorm.weight"], eps)
            inner = self._convolve(conv, 0, normed, normed)
            inner = self._attention(i, kind, inner, features)
            x = x + self._convolve(conv, 1, inner, normed)
            conv = name + "mlp_conv."
            normed = rms_norm(x, weight[name + "post_attention_layernorm.weight"], eps)
            inner = self._convolve(conv, 0, normed, normed)
            gate = inner @ weight[name + "mlp.gate_proj.weight"].T
            up = inner @ weight[name + "mlp.up_proj.weight"].T
            inner = (gate / (1 + np.exp(-gate)) * up) @ weight[name + "mlp.down_proj.weight"].T
            x = x + self._convolve(conv, 1, inner, normed)
        return rms_norm(x, weight["norm.weight"], eps) * self._get("output_multiplier", 1.0)

    def candidates(self, logits: np.ndarray) -> np.ndarray:
        """[k] rows of the head with the largest logits [V], the largest first."""
        return np.argsort(-logits, kind="stable")[: self.config["selector_top_k"]]

    def scores(
        self, hidden: np.ndarray, logits: np.ndarray, previous: int, ids: np.ndarray
    ) -> np.ndarray:
        """Scores [k] of one slot's candidates after a token.

        Args:
            hidden: [D] of the slot.
            logits: [k] of the candidates.
            previous: the target's id of the token before.
            ids: [k], the target's ids of the candidates.
        """
        name = "candidate_selector."
        query = self.weights[name + "hidden_projection.weight"] @ hidden
        before = self.weights[name + "predecessor_codebook"][previous] * query
        after = self.weights[name + "successor_codebook"][ids]
        return np.array([logits[c] + before @ after[c] for c in range(len(ids))])
