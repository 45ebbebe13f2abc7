"""The DFlash network: decoder layers whose keys are the context's features and the block itself.

Context rows are ``H = RMSNorm(fc(taps))``; every layer projects them with the same k and v
weights as its own block. Only context keys and values are cached, at the absolute positions of
the committed tokens; those of a block are used once.

Source: arXiv 2602.06036, section 3; the public checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import initialize_rope

from draftloom.checkpoint import DrafterDescription, WindowRule
from draftloom.device import on_cuda
from draftloom.kernels import qk_norm_rope
from draftloom.kernels.packed_projections import OneProduct

from .context import ContextCache, ContextWindow
from .one_product import PackedContext

__all__ = ["ALL_ROWS", "DFlashLayer", "DFlashModel", "Shared"]


class Shared:
    """What the layers of one pass share.

    Attributes:
        masks: the mask of each kind of layer, once one has made it.
        rotation: the positions of the block, likewise.
    """

    def __init__(self) -> None:
        self.masks: dict[tuple[Any, ...], mx.array | None] = {}
        self.rotation: qk_norm_rope.Rotation | None = None


Spans = list[tuple[int, int]]
"""Runs of rows, [start, stop) each."""
ALL_ROWS = slice(None)


class _Attention(nn.Module):
    def __init__(self, config: DrafterDescription, sliding: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window if sliding else None
        self.window_from_anchor = config.window_rule is WindowRule.BLOCK
        self.causal = sliding if config.is_causal is None else config.is_causal
        size = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias=False)
        self.product: OneProduct | None = None  # q, k and v as one; see `pack_network`
        self.placed_by: Any = None  # a kernel for norms and rotary positions of that product
        self.q_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.rope = initialize_rope(
            size,
            base=config.rope_theta,
            traditional=config.rope_interleaved,
            scaling_config=dict(config.rope_scaling) if config.rope_scaling else None,
            max_position_embeddings=config.max_positions,
        )

    def _split(self, x: mx.array, heads: int) -> mx.array:
        """[B, T, heads * size] -> [B, heads, T, size]."""
        rows, tokens, _ = x.shape
        return x.reshape(rows, tokens, heads, self.head_dim).transpose(0, 2, 1, 3)

    def keys_values(self, x: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Keys and values [B, Hkv, T, size] of rows [B, T, D] from an absolute position on."""
        return self._placed(self.k_proj(x), self.v_proj(x), position)

    def _placed(self, keys: mx.array, values: mx.array, position: int) -> tuple[mx.array, mx.array]:
        """Projected keys and values [B, T, Hkv * size] as attention takes them."""
        rows, tokens, _ = keys.shape
        keys = self.k_norm(keys.reshape(rows, tokens, self.kv_heads, self.head_dim))
        keys = self.rope(keys.transpose(0, 2, 1, 3), offset=position)
        return keys, self._split(values, self.kv_heads)

    @property
    def reach(self) -> int | None:
        """How many of the last context positions some slot sees; None is all."""
        if self.window is None:
            return None
        return self.window if self.window_from_anchor else self.window - 1

    def __call__(
        self, x: mx.array, cache: ContextCache, shared: Shared, rows: slice = ALL_ROWS
    ) -> mx.array:
        """These rows of a block [B, T, D] at the position after the context, over that context and
        the whole block."""
        tokens = x.shape[1]
        queries, *pair = self._block(x, cache.offset, shared, rows)
        keys, values = cache.with_block(*pair)
        if on_cuda():  # its attention is planned for the number of keys: one for many cycles
            keys, values = cache.arrays
        kind = (self.window, self.causal, cache.sinks, cache.window, keys.shape[2])
        if kind not in shared.masks:
            shared.masks[kind] = self._mask(tokens, cache, keys.shape[2])
        mask = shared.masks[kind]
        output = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=self.scale, mask=None if mask is None else mask[rows]
        )
        return self.o_proj(output.transpose(0, 2, 1, 3).flatten(2))

    def _block(
        self, x: mx.array, position: int, shared: Shared, rows: slice
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries of these rows of a block, keys and values of all, as attention takes them."""
        if self.product is not None and self.placed_by is not None:
            placed, keys, values = self._placed_at_once(self.product.joined(x), position, shared)
            return placed[:, :, rows], keys, values
        if self.product is None:
            queries, keys, values = self.q_proj(x[:, rows]), self.k_proj(x), self.v_proj(x)
        else:
            queries, keys, values = self.product(x)
            queries = queries[:, rows]
        first, _, _ = rows.indices(x.shape[1])
        queries = self.q_norm(queries.reshape(*queries.shape[:2], self.heads, self.head_dim))
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset=position + first)
        return queries, *self._placed(keys, values, position)

    def _placed_at_once(
        self, product: mx.array, position: int, shared: Shared
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of a product [B, T, N] of all three."""
        heads = qk_norm_rope.Heads(self.heads, self.kv_heads, self.head_dim, self.head_dim)
        if shared.rotation is None:
            shared.rotation = qk_norm_rope.Rotation(self.rope, position)
        norms = self.q_norm, self.k_norm
        found = qk_norm_rope.place(product, heads, norms, shared.rotation, use=self.placed_by)
        return *found, self._split(product[..., heads.ends[1] :], self.kv_heads)

    def _mask(self, tokens: int, cache: ContextCache, length: int) -> mx.array | None:
        """Which of the first `length` rows a query may see: [T, length]; None is all."""
        context, window = cache.offset, self.window
        if isinstance(context, int) and not self.causal and length == cache.held + tokens:
            seen = context if self.window_from_anchor else context + tokens
            if window is None or seen - (context - cache.held) <= window:
                return None
        query = context + mx.arange(tokens)[:, None]
        key = cache.positions(tokens, length)[None]
        mask = mx.broadcast_to(key < context + tokens, (tokens, length))
        if window is not None:
            oldest = context - window if self.window_from_anchor else query - window + 1
            mask = mask & ((key >= oldest) | (key >= context))
        if self.causal:
            mask = mask & (key <= query)
        return mask


class _MLP(nn.Module):
    def __init__(self, config: DrafterDescription) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.product: OneProduct | None = None  # gate and up as one; see `pack_network`

    def __call__(self, x: mx.array) -> mx.array:
        if self.product is None:
            return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.product(x)
        return self.down_proj(nn.silu(gate) * up)


class DFlashLayer(nn.Module):
    """A decoder layer over a context and a block.

    Args:
        config: the description.
        kind: ``full_attention`` or ``sliding_attention``.
    """

    def __init__(self, config: DrafterDescription, kind: str) -> None:
        super().__init__()
        self.self_attn = _Attention(config, sliding=kind == "sliding_attention")
        self.mlp = _MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, cache: ContextCache, shared: Shared, rows: slice = ALL_ROWS
    ) -> mx.array:
        """These rows of a block [B, T, D] after the layer, over the context in its cache. No more
        than these is computed, but for keys and values."""
        h = x[:, rows] + self.self_attn(self.input_layernorm(x), cache, shared, rows)
        return h + self.mlp(self.post_attention_layernorm(h))


class DFlashModel(nn.Module):
    """The network. Embedding and head are the target's, but for those that the checkpoint has.

    Tensor names are those of the z-lab checkpoints.

    Args:
        config: the description.
        own: ``embed_tokens``, ``lm_head``, as far as the checkpoint has them.
    """

    def __init__(self, config: DrafterDescription, own: frozenset[str] = frozenset()) -> None:
        super().__init__()
        if "embed_tokens" in own:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if "lm_head" in own:
            size = config.draft_vocab_size or config.vocab_size
            self.lm_head = nn.Linear(config.hidden_size, size, bias=False)
        self.fc = nn.Linear(
            len(config.tap_layers) * config.hidden_size, config.hidden_size, bias=False
        )
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = [self.make_layer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.packed_context: PackedContext | None = None  # see `pack_network`

    def make_layer(self, config: DrafterDescription, kind: str) -> DFlashLayer:
        """One layer; networks with other layers make theirs here."""
        return DFlashLayer(config, kind)

    def make_cache(self, window: ContextWindow | None = None) -> list[ContextCache]:
        """Empty context caches, one a layer.

        Args:
            window: positions that are kept; None is the default window. A layer with a window of
                its own keeps no more than that ever shows it.
        """
        window = ContextWindow() if window is None else window
        layers: list[Any] = self.layers
        return [window.cache(layer.self_attn.reach) for layer in layers]

    def extend(self, features: mx.array, cache: list[ContextCache]) -> None:
        """Append context rows for features [B, T, F] of committed tokens to the caches. What no
        layer keeps is not projected."""
        tokens = features.shape[1]
        spans = [entry.spans(tokens) for entry in cache]
        kept = _union(span for part in spans for span in part)
        rows = [features[:, start:stop] for start, stop in kept]
        if rows:
            context = self.hidden_norm(self.fc(mx.concatenate(rows, axis=1)))
            one_product = self.packed_context is not None and all(s == spans[0] for s in spans)
            (self._put_all if one_product else self._put_each)(context, kept, cache, spans)
        for entry in cache:
            entry.advance(tokens)

    def _put_each(
        self, context: mx.array, kept: Spans, cache: list[ContextCache], spans: list[Spans]
    ) -> None:
        """Project and store what each layer keeps of the context's rows."""
        layer: Any
        for layer, entry, part in zip(self.layers, cache, spans, strict=True):
            for start, stop in part:
                row = _row_of(start, kept)
                position = entry.offset + start
                found = layer.self_attn.keys_values(context[:, row : row + stop - start], position)
                entry.put(position, *found)

    def _put_all(
        self, context: mx.array, kept: Spans, cache: list[ContextCache], spans: list[Spans]
    ) -> None:
        """The same where all layers keep the same rows: one product for all."""
        assert self.packed_context is not None
        for start, stop in spans[0]:
            row = _row_of(start, kept)
            position = cache[0].offset + start
            both = self.packed_context(context[:, row : row + stop - start], position)
            for entry, keys, values in zip(cache, *both, strict=True):
                entry.put(position, keys, values)

    def __call__(
        self, embeddings: mx.array, cache: list[ContextCache], rows: slice = ALL_ROWS
    ) -> mx.array:
        """Normed hidden states of these rows of a block, from its embeddings [B, T, D]. Other rows
        are computed as far as these see them."""
        h, shared = embeddings, Shared()
        last = len(self.layers) - 1
        for index, (layer, entry) in enumerate(zip(self.layers, cache, strict=True)):
            h = layer(h, entry, shared, rows if index == last else ALL_ROWS)
        return self.norm(h)


def _union(spans: Iterable[tuple[int, int]]) -> Spans:
    """Spans [start, stop) joined where they meet, in order."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _row_of(position: int, spans: Spans) -> int:
    """Where a position stands once the spans are put side by side."""
    row = 0
    for start, stop in spans:
        if start <= position < stop:
            return row + position - start
        row += stop - start
    raise ValueError(f"position {position} is in none of {spans}")
