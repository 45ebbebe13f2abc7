"""One training step: the forward of all blocks of a batch over the drafter's own parameters, and
its loss."""

from __future__ import annotations

from typing import Any

import attrs
import mlx.core as mx
from mlx.nn.utils import checkpoint
from mlx.utils import tree_map

from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import TargetAdapter
from draftloom.drafters.dflash import DFlashModel, embedding_factor

from .mask import block_mask
from .settings import TrainSettings, default_gamma

__all__ = ["BlockBatch", "DrafterLoss", "block_hidden", "block_logits", "slot_weights"]


@attrs.frozen(eq=False)
class BlockBatch:
    """Blocks of R sequences, N of each.

    Attributes:
        features: [R, S, F] of the target; rows past a sequence's end are seen by nobody.
        anchors: [R, N] int32 positions.
        anchor_tokens: [R, N] int32, the tokens there.
        labels: [R, N, K] int32, the K tokens after each anchor.
        valid: [R, N, K] float32, 1 where a label counts, 0 where not.
        teacher: [R, N, K, V], logits of the target for the labels; None without the KL loss.
    """

    features: mx.array
    anchors: mx.array
    anchor_tokens: mx.array
    labels: mx.array
    valid: mx.array
    teacher: mx.array | None = None


def _attend(
    attention: Any, x: mx.array, context: mx.array, anchors: mx.array, mask: mx.array
) -> mx.array:
    """Attention of block rows [R, N*T, D] over context rows [R, S, D] and their own blocks.

    Two products and one softmax: a block is compared with the context and itself, so that the work
    grows with N * T * (S + T), not with (N * T)^2.
    """
    rows, blocks = anchors.shape
    tokens, hidden, width = x.shape[1] // blocks, x.shape[2], context.shape[1]
    heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
    shared = heads // kv_heads
    # Every block is a row of its own for the rotary embedding: positions begin at its anchor.
    single, positions = x.reshape(rows * blocks, tokens, hidden), anchors.reshape(-1)

    def split(y: mx.array, *groups: int) -> mx.array:
        """[R*N, heads, T, size] -> [R, *groups, N, T, size]."""
        y = y.reshape(rows, blocks, -1, tokens, size).transpose(0, 2, 1, 3, 4)
        return y.reshape(rows, *groups, blocks, tokens, size)

    queries = attention.q_norm(
        attention.q_proj(single).reshape(rows * blocks, tokens, heads, size)
    ).transpose(0, 2, 1, 3)
    queries = split(attention.rope(queries, offset=positions) * attention.scale, kv_heads, shared)
    own = (split(y, kv_heads, 1) for y in attention.keys_values(single, positions))
    own_keys, own_values = own
    keys, values = attention.keys_values(context, 0)  # [R, Hkv, S, size]

    flat = queries.reshape(rows, kv_heads, shared * blocks * tokens, size)
    to_context = flat @ keys.swapaxes(-1, -2)
    to_context = to_context.reshape(rows, kv_heads, shared, blocks, tokens, width)
    scores = mx.concatenate([to_context, queries @ own_keys.swapaxes(-1, -2)], axis=-1)
    scores = mx.where(mask[:, None, None], scores, mx.array(-mx.inf, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True)
    of_context = weights[..., :width].reshape(*flat.shape[:-1], width) @ values
    output = of_context.reshape(queries.shape) + weights[..., width:] @ own_values
    # [R, Hkv, g, N, T, size] -> [R, N*T, H*size]
    output = output.transpose(0, 3, 4, 1, 2, 5).reshape(rows, blocks * tokens, heads * size)
    return attention.o_proj(output)


def block_hidden(
    model: DFlashModel,
    features: mx.array,
    embeddings: mx.array,
    anchors: mx.array,
    *,
    recompute: bool = False,
) -> mx.array:
    """Normed hidden states of all blocks in one pass.

    Args:
        model: the drafter's network, as inference uses it.
        features: [R, S, F].
        embeddings: [R, N, T, D] of [anchor, MASK x (T-1)].
        anchors: [R, N] int32.
        recompute: whether a layer keeps nothing for its gradient but its input.

    Returns:
        [R, N, T, D].
    """
    rows, blocks, tokens, hidden = embeddings.shape
    context = model.hidden_norm(model.fc(features))
    h = embeddings.reshape(rows, blocks * tokens, hidden)
    masks: dict[tuple[bool, int | None], mx.array] = {}
    layer: Any
    for layer in model.layers:
        attention = layer.self_attn
        kind = (attention.causal, attention.window)
        if kind not in masks:
            masks[kind] = block_mask(
                anchors, features.shape[1], tokens, causal=kind[0], window=kind[1]
            )

        def run(h: mx.array, context: mx.array, mask: mx.array, layer: Any = layer) -> mx.array:
            h = h + _attend(layer.self_attn, layer.input_layernorm(h), context, anchors, mask)
            return h + layer.mlp(layer.post_attention_layernorm(h))  # type: ignore[no-any-return]

        step: Any = checkpoint(layer, run) if recompute else run
        h = step(h, context, masks[kind])
    return model.norm(h).reshape(rows, blocks, tokens, hidden)


def draft_hidden(
    model: DFlashModel,
    config: DrafterDescription,
    target: TargetAdapter,
    batch: BlockBatch,
    *,
    recompute: bool = False,
) -> mx.array:
    """Hidden states [R, N, K, D] of the draft slots, as the target's head takes them."""
    rows, blocks, slots = batch.labels.shape
    masks = mx.full((rows, blocks, slots), config.mask_token_id, dtype=mx.int32)
    tokens = mx.concatenate([batch.anchor_tokens[..., None], masks], axis=-1)
    embeddings = target.embed(tokens.reshape(rows, -1)) * config.embedding_scale
    dtype = model.norm.weight.dtype
    embeddings = embeddings.reshape(rows, blocks, slots + 1, -1).astype(dtype)
    features = mx.stop_gradient(batch.features)
    if config.dtype is not None:  # as they will be when it drafts
        features = features.astype(getattr(mx, config.dtype))
    features = features.astype(dtype)
    hidden = block_hidden(model, features, embeddings, batch.anchors, recompute=recompute)
    return hidden[:, :, 1:] * config.output_multiplier


def block_logits(
    model: DFlashModel, config: DrafterDescription, target: TargetAdapter, batch: BlockBatch
) -> mx.array:
    """Logits [R, N, K, V] float32 of the draft slots. The target's head caps by itself, where it
    does."""
    return target.head(draft_hidden(model, config, target, batch)).astype(mx.float32)


def slot_weights(
    label_probs: mx.array, valid: mx.array, settings: TrainSettings, block_size: int
) -> mx.array:
    """Weight of each slot.

    Args:
        label_probs: [R, N, K], what the drafter gives the labels.
        valid: [R, N, K].
        settings: weighting, gamma, alpha.
        block_size: K + 1.

    Returns:
        [R, N, K] without gradient: exp(-(k-1)/gamma) for ``decay``; for ``d-pace``
        w_k = sum_{j>=k} P_j with P_j = prod_{i<=j} (1-a) p_i + a. Zero where not valid.

    Source: arXiv 2602.06036; the public speculators package (D-PACE).
    """
    if settings.weighting == "decay":
        gamma = settings.gamma or default_gamma(block_size)
        return mx.exp(-mx.arange(block_size - 1) / gamma) * valid
    kept = mx.stop_gradient((1 - settings.alpha) * label_probs + settings.alpha)
    reached = mx.cumprod(kept, axis=-1) * valid
    return mx.cumsum(reached, axis=-1, reverse=True) * valid


class DrafterLoss:
    """The loss of a batch as a function of the drafter's float32 parameters.

    Args:
        model: the network; its parameters are exchanged by every call.
        config: of the drafter.
        target: frozen; gives embedding and head.
        settings: loss, weighting, compute type.
    """

    def __init__(
        self,
        model: DFlashModel,
        config: DrafterDescription,
        target: TargetAdapter,
        settings: TrainSettings,
    ) -> None:
        self._model, self._target = model, target
        factor = embedding_factor(config, target)  # measured here: nothing is read in a step
        self._config = attrs.evolve(config, embedding_scale=factor, scales_table=False)
        self._settings = settings
        self._dtype = getattr(mx, settings.compute)

    def __call__(self, parameters: Any, batch: BlockBatch) -> tuple[mx.array, mx.array]:
        """The weighted mean loss, and [K] shares of slots whose most likely token is the label."""
        self._model.update(tree_map(lambda p: p.astype(self._dtype), parameters))
        recompute = self._settings.recompute
        hidden = draft_hidden(self._model, self._config, self._target, batch, recompute=recompute)
        parts = [hidden, batch.labels, batch.valid]
        parts += [] if batch.teacher is None else [batch.teacher]
        if recompute:  # logits of one sequence at a time, made again for the gradient
            one: Any = mx.checkpoint(self._sums)
            rows = [one(*(part[r : r + 1] for part in parts)) for r in range(hidden.shape[0])]
            loss, weight, right = (sum(found[1:], found[0]) for found in zip(*rows, strict=True))
        else:
            loss, weight, right = self._sums(*parts)
        counted = mx.maximum(batch.valid.sum(axis=(0, 1)), 1)
        return loss / mx.maximum(weight, 1e-6), right / counted

    def _sums(
        self,
        hidden: mx.array,
        labels: mx.array,
        valid: mx.array,
        target_logits: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Sum of the weighted losses, of the weights, and [K] right slots."""
        labels, valid = mx.stop_gradient(labels), mx.stop_gradient(valid)
        logits = self._target.head(hidden).astype(mx.float32)
        total = mx.logsumexp(logits, axis=-1)
        of_label = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0] - total
        if target_logits is None:
            loss = -of_label
        else:
            teacher = mx.softmax(mx.stop_gradient(target_logits).astype(mx.float32), axis=-1)
            entropy = (teacher * mx.log(mx.maximum(teacher, 1e-30))).sum(axis=-1)
            loss = entropy + total - (teacher * logits).sum(axis=-1)
        weights = slot_weights(mx.exp(of_label), valid, self._settings, self._config.block_size)
        right = (mx.argmax(logits, axis=-1) == labels) * valid
        return (loss * weights).sum(), weights.sum(), right.sum(axis=(0, 1))

    def gradients(
        self, parameters: Any, batch: BlockBatch
    ) -> tuple[tuple[mx.array, mx.array], Any]:
        """The loss, the shares, and the gradient for every parameter of the drafter."""
        value, gradient = mx.value_and_grad(self)(parameters, batch)
        return value, gradient
