"""Attention layers whose attention can be another than mlx-lm's.

A stand-in takes the place of the attention module of one layer and shares its parameters and
projections. What lies around the attention itself (norms, rotary positions, the cache, a gate) is
written here again, in mlx-lm's order of operations; contract tests compare it with stock mlx-lm,
bit for bit on the CPU. Nothing is replaced unless another attention than mlx-lm's is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3_text, gpt_oss, llama, qwen2, qwen2_moe, qwen3, qwen3_moe
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.qwen3_next import Qwen3NextAttention

from draftloom.errors import UnsupportedModelError, UsageError

__all__ = [
    "KNOWN_CLASSES",
    "Attend",
    "AttentionLayers",
    "AttentionModule",
    "Weighting",
    "attend_stock",
]


@attrs.frozen(eq=False)
class Weighting:
    """How scores become weights.

    Attributes:
        scale: factor on the scores.
        mask: the model's: None, "causal" or an array.
        sinks: [Hq] one logit more a head, or None.
    """

    scale: float
    mask: Any
    sinks: mx.array | None = None


Attend = Callable[[mx.array, mx.array, mx.array, Any, Weighting], mx.array]
"""(queries [B, Hq, T, D], keys and values [B, Hkv, N, D] as the cache gave them, the cache or None,
the weighting) -> [B, Hq, T, D]."""


@attrs.frozen
class _Form:
    """What a class calls its parts, and which it has."""

    heads: str
    key_heads: str
    scale: str = "scale"
    normed: bool = False
    gated: bool = False
    sinks: bool = False


_FORMS: dict[type, _Form] = {
    gemma3_text.Attention: _Form("n_heads", "n_kv_heads", normed=True),
    gpt_oss.AttentionBlock: _Form(
        "num_attention_heads", "num_key_value_heads", scale="sm_scale", sinks=True
    ),
    llama.Attention: _Form("n_heads", "n_kv_heads"),
    qwen2.Attention: _Form("n_heads", "n_kv_heads"),
    qwen2_moe.Attention: _Form("n_heads", "n_kv_heads"),
    qwen3.Attention: _Form("n_heads", "n_kv_heads", normed=True),
    qwen3_moe.Attention: _Form("n_heads", "n_kv_heads", normed=True),
    Qwen3NextAttention: _Form(
        "num_attention_heads", "num_key_value_heads", normed=True, gated=True
    ),
}
KNOWN_CLASSES = tuple(_FORMS)
"""Classes of mlx-lm that can be stood in for; exactly these, no subclasses."""


def attend_stock(
    q: mx.array, k: mx.array, v: mx.array, cache: Any, weighting: Weighting
) -> mx.array:
    """mlx-lm's own attention, packed key/value caches included."""
    how = weighting
    return scaled_dot_product_attention(
        q, k, v, cache=cache, scale=how.scale, mask=how.mask, sinks=how.sinks
    )


class AttentionModule(nn.Module):
    """Stands in for an attention module and shares its parameters.

    Args:
        attention: the layer's own; of one of `KNOWN_CLASSES`.
        attend: how queries attend.
    """

    def __init__(self, attention: nn.Module, attend: Attend = attend_stock) -> None:
        super().__init__()
        self.attention = attention
        form = _FORMS[type(attention)]
        # Not through nn.Module's own setattr, which would look for parameters in them.
        object.__setattr__(self, "_form", form)
        object.__setattr__(self, "_attend", attend)
        object.__setattr__(self, "_heads", getattr(attention, form.heads))
        object.__setattr__(self, "_key_heads", getattr(attention, form.key_heads))
        object.__setattr__(self, "_scale", getattr(attention, form.scale))

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        """Output [B, T, D] of inputs [B, T, D]."""
        rows, tokens, _ = x.shape
        q = self.attention.q_proj(x).reshape(rows, tokens, self._heads, -1)
        k = self.attention.k_proj(x).reshape(rows, tokens, self._key_heads, -1)
        v = self.attention.v_proj(x).reshape(rows, tokens, self._key_heads, -1)
        gate = None
        if self._form.gated:
            q, gate = mx.split(q, 2, axis=-1)
        if self._form.normed:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))
        if cache is not None:
            q = self.attention.rope(q, offset=cache.offset)
            k = self.attention.rope(k, offset=cache.offset)
            k, v = cache.update_and_fetch(k, v)
        else:
            q, k = self.attention.rope(q), self.attention.rope(k)
        sinks = self.attention.sinks if self._form.sinks else None
        output = self._attend(q, k, v, cache, Weighting(self._scale, mask, sinks))
        output = output.transpose(0, 2, 1, 3).reshape(rows, tokens, -1)
        if gate is not None:
            output = output * mx.sigmoid(gate.reshape(rows, tokens, -1))
        return self.attention.o_proj(output)


class AttentionLayers:
    """Puts stand-ins into the layers of a model, and takes them out again.

    Args:
        layers: the model's decoder layers; those without `self_attn` of a known class are left
            alone.
        name: of the model, for errors.

    Raises:
        UsageError: the model has stand-ins already: another pipeline uses it.
    """

    def __init__(self, layers: Sequence[Any], name: str) -> None:
        self._originals: list[tuple[Any, nn.Module]] = []
        self._name = name
        modules = [layer for layer in layers if isinstance(layer, nn.Module)]
        self._layers = [layer for layer in modules if type(layer.get("self_attn")) in _FORMS]
        if any(isinstance(layer.get("self_attn"), AttentionModule) for layer in modules):
            raise UsageError(f"{name} is in use by another pipeline", "close that one first")

    def __len__(self) -> int:
        """Layers whose attention can be stood in for."""
        return len(self._layers)

    @property
    def attentions(self) -> list[Any]:
        """The model's own modules, in the order of the layers."""
        if self._originals:
            return [attention for _, attention in self._originals]
        return [layer.self_attn for layer in self._layers]

    def replace(self, make: Callable[[nn.Module], AttentionModule]) -> None:
        """Exchange every known attention module for what `make` gives for it; what was exchanged
        before is put back first.

        Raises:
            UnsupportedModelError: no layer has a known attention module.
        """
        self.restore()
        if not self._layers:
            raise UnsupportedModelError(
                f"no attention layer of {self._name} can be stood in for",
                "leave verify-attention at auto or off",
            )
        made = [(layer, layer.self_attn, make(layer.self_attn)) for layer in self._layers]
        for layer, attention, stand in made:
            self._originals.append((layer, attention))
            layer.self_attn = stand

    def restore(self) -> None:
        """Put every attention module back."""
        for layer, attention in self._originals:
            layer.self_attn = attention
        self._originals.clear()
