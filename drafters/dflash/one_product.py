"""A drafter's projections as fewer products: what of ``packed-drafter`` is done to a network.

The weights of q, k and v of all layers lie in one array. A layer's own three rows of it are one
product over the block; the k and v rows of every layer are one product over the context's features,
which all layers project. Gate and up of an MLP are another. Nothing is held twice.
"""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx

from draftloom.kernels import few_rows, qk_norm_rope
from draftloom.kernels.packed_projections import (
    Decision,
    OneProduct,
    ProductStack,
    decide,
    pays,
    why_not,
)

__all__ = ["OPERATION", "PackedContext", "few_rows_in_network", "pack_network", "place_heads"]

OPERATION = "packed-drafter"
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_log = logging.getLogger("draftloom.kernels")


class PackedContext:
    """Keys and values of context rows for every layer at once.

    Args:
        attentions: of the layers; they differ in weights only.
        stack: their q, k and v.
    """

    def __init__(self, attentions: list[Any], stack: ProductStack) -> None:
        self._like = attentions[0]
        self._stack = stack
        weights = mx.stack([attention.k_norm.weight for attention in attentions])
        self._norms = weights[:, None, None, None]  # [L, B, T, Hkv, size] is what they scale
        mx.eval(self._norms)

    def __call__(self, x: mx.array, position: int) -> tuple[list[mx.array], list[mx.array]]:
        """Keys and values [B, Hkv, T, size] of each layer, of rows [B, T, D] from an absolute
        position on."""
        like, (keys, values) = self._like, self._stack.over_all(x)
        layers, rows, tokens, _ = keys.shape
        shape = (layers, rows, tokens, like.kv_heads, like.head_dim)
        keys = mx.fast.rms_norm(keys.reshape(shape), None, like.k_norm.eps) * self._norms
        keys = keys.reshape(layers * rows, *shape[2:]).transpose(0, 2, 1, 3)
        keys = like.rope(keys, offset=position)
        values = values.reshape(layers * rows, *shape[2:]).transpose(0, 2, 1, 3)
        parts: Any = (mx.split(part, layers, axis=0) for part in (keys, values))
        found_keys, found_values = parts
        return found_keys, found_values


def few_rows_in_network(network: Any, use: Any) -> None:
    """Run a network's products of few rows by a kernel, if that is what `use` says. Packed layers
    are packed before.

    Args:
        network: a `DFlashModel`, its weights loaded.
        use: as `draftloom.kernels.few_rows.product`.
    """
    use = few_rows.OPERATION.wanted(use)
    if use is None:
        return
    for layer in network.layers:
        for module in (layer.self_attn, layer.mlp):
            if module.product is not None:
                module.product.few_rows = use
    few_rows.exchange(network, use)


def place_heads(network: Any, use: Any) -> None:
    """Norm and rotate q and k of packed products by a kernel, if that is what `use` says.

    Args:
        network: a `DFlashModel`, packed as it is to be.
        use: as `draftloom.kernels.qk_norm_rope.place`.
    """
    wanted = qk_norm_rope.OPERATION.wanted(use)
    for layer in network.layers:
        layer.self_attn.placed_by = wanted
    apart = all(layer.self_attn.product is None for layer in network.layers)
    if use is not None and wanted is not None and apart:
        _log.warning(
            "%s: it reads q and k from one product, and they are apart: choose %s=attention too",
            qk_norm_rope.OPERATION.name,
            OPERATION,
        )


def pack_network(network: Any, use: Any) -> Decision | None:
    """Run what `use` says as fewer products, from now on. The weights of the network are final.

    Args:
        network: a `DFlashModel`, its weights loaded.
        use: None for what pays here, ``off``, the name of an implementation, or a plan.

    Returns:
        What was packed; None where nothing was looked at.
    """
    if use == "off" or (use is None and not pays(OPERATION)):
        return None
    attentions = [layer.self_attn for layer in network.layers]
    mlps = [layer.mlp for layer in network.layers]
    groups: dict[str, list[list[Any]]] = {}
    reasons = []
    stacked = [[attention[name] for name in _QKV] for attention in attentions]
    reason = next(filter(None, (why_not(dict(zip(_QKV, g, strict=True))) for g in stacked)), None)
    if reason is None:
        reason = ProductStack.why_not(stacked)
    if reason is None:
        groups["attention"] = stacked
        groups["context"] = [[layer for group in stacked for layer in group[1:]]]
    else:
        reasons.append(reason)
    gates = [[mlp[name] for name in _GATE_UP] for mlp in mlps]
    reason = next(filter(None, (why_not(dict(zip(_GATE_UP, g, strict=True))) for g in gates)), None)
    if reason is None:
        groups["mlp"] = gates
    else:
        reasons.append(reason)
    for reason in reasons:
        _log.warning("%s: projections stay apart: %s", OPERATION, reason)
    decision = decide(OPERATION, use, groups)
    if decision.kinds & {"attention", "context"}:
        stack = ProductStack(stacked, shared=2)
        if "attention" in decision.kinds:
            for attention, product in zip(attentions, stack.products, strict=True):
                attention.product = product
        if "context" in decision.kinds:
            network.packed_context = PackedContext(attentions, stack)
    if "mlp" in decision.kinds:
        for mlp, layers in zip(mlps, gates, strict=True):
            mlp.product = OneProduct(layers)
            mlp.product.adopt()
    return decision
