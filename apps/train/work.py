"""How many floating-point operations a step needs at least: what its speed is compared with."""

from __future__ import annotations

import mlx.nn as nn

from draftloom.checkpoint import DrafterDescription

from .step import BlockBatch
from .target import FrozenTarget

__all__ = ["drafter_operations", "target_operations"]


def drafter_operations(config: DrafterDescription, batch: BlockBatch) -> int:
    """Operations of the matrix products of forward and backward, a product's multiply and add being
    two. Padding counts: it is computed too.

    Args:
        config: of the drafter.
        batch: its shapes count.
    """
    rows, context, width = batch.features.shape
    blocks, slots = batch.anchors.shape[1], batch.labels.shape[2]
    tokens = slots + 1
    size, hidden = config.head_dim, config.hidden_size
    queries, keys = config.num_heads * size, config.num_kv_heads * size
    of_context = config.num_layers * 2 * hidden * keys
    of_block = config.num_layers * (
        2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    )
    attention = config.num_layers * 2 * queries * (context + tokens)
    both = context * of_context + blocks * tokens * (of_block + attention)
    # Of the features no gradient is needed, and none of the frozen head's weights.
    once = context * width * hidden + blocks * slots * hidden * config.vocab_size
    return rows * 2 * (3 * both + 2 * once)


def target_operations(target: FrozenTarget, taps: tuple[int, ...], tokens: int) -> int:
    """Operations of the linear layers of the target up to the last tapped one: nothing after it is
    computed for features. Attention, recurrences and experts are not counted.

    Args:
        target: frozen.
        taps: layers whose outputs are the features.
        tokens: run through it, padding included.
    """
    layers = getattr(target.model, "language_model", target.model).model.layers
    total = 0
    for layer in layers[: max(taps) + 1]:
        for module in layer.modules():
            if isinstance(module, nn.QuantizedLinear):
                total += module.weight.size * 32 // module.bits
            elif isinstance(module, nn.Linear):
                total += module.weight.size
    return 2 * tokens * total
