"""Projections of a model that run as one matrix product, without a forward written again.

Layers that read one input (q, k and v; gate and up) get stand-ins. The first of them that is called
with an input runs the product for all and keeps the rest for the others, which mlx-lm calls with
the very same array. Whatever the order, a stand-in gives what its own layer gives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.kernel_settings import AUTO, OFF, KernelSettings
from draftloom.kernels.packed_projections import (
    Decision,
    OneProduct,
    decide,
    pays,
    why_not,
)
from draftloom.kernels.stand_in import StandIn

__all__ = ["OPERATION", "SITES", "PackedModel", "PackedPart"]

OPERATION = "packed-projections"
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_ATTENTIONS = (
    "cohere.Attention", "cohere2.Attention", "ernie4_5.Attention", "exaone4.Attention",
    "gemma.Attention", "gemma2.Attention", "gemma3_text.Attention", "gemma4_text.Attention",
    "glm4.Glm4Attention", "glm4_moe.Attention", "gpt_oss.AttentionBlock", "granite.Attention",
    "granitemoe.GraniteMoeAttention", "hunyuan_v1_dense.Attention", "internlm3.Attention",
    "llama.Attention", "minicpm.Attention", "ministral3.Attention", "mixtral.MixtralAttention",
    "nemotron.Attention", "olmo2.Attention", "olmo3.Olmo3Attention", "olmoe.Attention",
    "phi.PhiAttention", "qwen2.Attention", "qwen2_moe.Attention", "qwen3.Attention",
    "qwen3_moe.Attention", "qwen3_next.Qwen3NextAttention", "seed_oss.Attention",
    "stablelm.Attention", "starcoder2.Attention",
)  # fmt: skip
_MLPS = (
    "cohere.MLP", "cohere2.MLP", "deepseek_v2.DeepseekV2MLP", "deepseek_v3.DeepseekV3MLP",
    "ernie4_5.MLP", "exaone4.MLP", "gemma.MLP", "gemma2.MLP", "gemma3_text.MLP",
    "gemma4_text.MLP", "glm4_moe.MLP", "granite.MLP", "hunyuan_v1_dense.MLP", "internlm3.MLP",
    "llama.MLP", "minicpm.MLP", "ministral3.MLP", "olmo2.MLP", "olmo3.Olmo3MLP", "qwen2.MLP",
    "qwen2_moe.MLP", "qwen3.MLP", "qwen3_moe.MLP", "qwen3_next.Qwen3NextMLP", "seed_oss.MLP",
    "stablelm.MLP",
)  # fmt: skip
SITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen3_5.GatedDeltaNet": (
        "gated-delta",
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ),
    "qwen3_next.Qwen3NextGatedDeltaNet": ("gated-delta", ("in_proj_qkvz", "in_proj_ba")),
    **dict.fromkeys(_ATTENTIONS, ("attention", _QKV)),
    **dict.fromkeys(_MLPS, ("mlp", _GATE_UP)),
}
"""For exactly these classes of mlx-lm: what kind of place it is, and which of its layers read one
input. A test runs every one of them and counts its products."""
_MODELS = "mlx_lm.models."

_log = logging.getLogger("draftloom.kernels")


def _site_of(module: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Kind and layers of a place; None where there is none, or where a layer that shares another's
    keys or values lacks some of its own."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if not name.startswith(_MODELS):
        return None
    site = SITES.get(name.removeprefix(_MODELS))
    return site if site is not None and all(part in module for part in site[1]) else None


class _Results:
    """What the product gave of the last input, until every layer has taken its part."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.product = OneProduct(layers)
        self._layers = list(layers)
        self._input: mx.array | None = None
        self._parts: list[mx.array | None] = []

    def take(self, index: int, x: mx.array) -> mx.array:
        """What layer `index` gives of x."""
        if self._input is not x or self._parts[index] is None:
            if not self.product.current:  # somebody gave a layer other weights
                alone: mx.array = self._layers[index](x)
                return alone
            self._input = x
            self._parts = [*self.product(x)]
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if all(other is None for other in self._parts):
            self._input = None
        return part


class PackedPart(StandIn):
    """Stands in for a linear layer that is run with others."""

    held = "linear"

    def __init__(self, linear: nn.Module, results: _Results, index: int) -> None:
        super().__init__(linear, results=results, index=index)

    def __call__(self, x: mx.array) -> mx.array:
        return self._results.take(self._index, x)


class PackedModel:
    """The places of a model whose layers can run as one product, and what was made of them.

    Args:
        model: loaded. Nothing is changed before `tune`.

    Attributes:
        decision: what was packed, and why; None before `tune`.
        products: what runs in place of the layers.
        refused: why a place was left as it is, by the place's path.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: list[tuple[Any, str, nn.Module]] = []
        self.products: list[OneProduct] = []
        self.decision: Decision | None = None
        self.refused: dict[str, str] = {}

    def tune(self, settings: KernelSettings) -> None:
        """Pack what the settings say; what was packed before is undone first."""
        self.restore()
        choice = settings.choice(OPERATION)
        if choice == OFF or (choice == AUTO and not pays(OPERATION)):
            return
        places = list(self._places())
        groups: dict[str, list[list[Any]]] = {}
        for kind, owner, names in places:
            groups.setdefault(kind, []).append([owner[name] for name in names])
        self.decision = decide(OPERATION, settings.use(OPERATION, off=OFF), groups)
        for kind, owner, names in places:
            if kind in self.decision.kinds:
                self._pack(owner, names)
        if choice != AUTO and not groups:
            reasons = sorted(set(self.refused.values())) or ["no place of a known class"]
            _log.warning("%s: nothing can be packed: %s", OPERATION, "; ".join(reasons))

    def restore(self) -> None:
        """Put every layer back. Values stay what they are: the layers keep slices of the products'
        weights."""
        for owner, name, linear in self._replaced:
            owner[name] = linear
        for product in self.products:
            product.release()
        self._replaced.clear()
        self.products.clear()
        self.decision = None

    def _places(self) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
        """Places that can be packed: their kind, their module, and its layers' names."""
        self.refused.clear()
        for path, module in self._model.named_modules():
            site = _site_of(module)
            if site is None:
                continue
            kind, names = site
            owner: Any = module
            if getattr(owner, "sharding_group", None) is not None:
                reason: str | None = "it is sharded over processes"
            else:
                reason = why_not({name: owner[name] for name in names})
            if reason is None:
                yield kind, owner, names
            else:
                self.refused[path] = reason
                _log.info("%s: %s is left as it is: %s", OPERATION, path, reason)

    def _pack(self, owner: Any, names: Sequence[str]) -> None:
        """Memory of the old weights goes as the new ones come, one place after the other."""
        layers = [owner[name] for name in names]
        results = _Results(layers)
        results.product.adopt()
        self.products.append(results.product)
        for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
            owner[name] = PackedPart(layer, results, index)
            self._replaced.append((owner, name, layer))
