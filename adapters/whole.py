"""Models whose forward mlx-lm runs whole, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from draftloom.contracts import TargetInfo, TargetOutput
from draftloom.errors import UnsupportedModelError, UsageError
from draftloom.kv_cache import KVQuantization
from draftloom.model_info import ModelInfo

from .base import cache_kind, make_skeleton, sketch
from .parts import Parts
from .quantized_kv import why_not_quantized_kv
from .taps import LayerTaps, TapLayer
from .tuned import TunedModel

__all__ = ["WholeModelAdapter", "describe_whole"]

LIMITS = ("max_position_embeddings", "n_positions", "model_max_length", "max_seq_len")
"""Names that configs have for the most positions a model was made for."""


class _TapFirst(TapLayer):
    """A tap of a layer that may return more than its hidden states."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self._outputs[self._index] = output[0] if isinstance(output, tuple) else output
        return output


class _Taps(LayerTaps):
    def set(self, layers: Sequence[int]) -> None:
        """Tap these layers and no others."""
        self.clear()
        self._order = tuple(layers)
        for index in set(layers):
            self._originals[index] = self._layers[index]
            self._layers[index] = _TapFirst(self._layers[index], index, self._outputs)


def describe_whole(model: ModelInfo, adapter: str, check: Callable[..., str]) -> TargetInfo:
    """Description of a model, from the shapes that its own forward gives.

    Args:
        model: its config.
        adapter: name of the adapter.
        check: why hidden states cannot be taken, as `why_no_taps`.

    Raises:
        ModelError: mlx-lm does not know the model type, or the config lacks what its class needs.
        UnsupportedModelError: its forward is not that of a language model.
    """
    skeleton, args = make_skeleton(model)
    try:
        caches = make_prompt_cache(skeleton)
        parts = Parts.of(skeleton)
        logits = skeleton(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
        hidden_size = _hidden_size(args, parts)
        reason = check(skeleton, parts, hidden_size)
        vocab_size = int(logits.shape[-1])
    except (
        TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError,
    ) as error:  # fmt: skip
        raise UnsupportedModelError(
            f"{model.name} ({model.model_type}) does not run as a language model: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "docs/how-to/write-an-adapter.md shows how to serve it",
        ) from error
    return TargetInfo(
        name=model.name,
        adapter=adapter,
        model_type=model.model_type,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_layers=len(skeleton.layers),
        cache_kinds=tuple(cache_kind(cache) for cache in make_prompt_cache(skeleton)),
        context_limit=_first_int(args, *LIMITS),
        can_tap=not reason,
        why_no_taps=reason,
    )


def _hidden_size(args: Any, parts: Parts | None) -> int:
    known = _first_int(args, "hidden_size", "n_embd", "d_model", "dim")
    if known is not None or parts is None:
        return known or 0
    return int(parts.embed(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])


def _first_int(args: Any, *names: str) -> int | None:
    found = (getattr(args, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


class WholeModelAdapter(TunedModel):
    """A model of mlx-lm whose forward is used as it is, whatever its layout.

    Args:
        model: as mlx-lm loaded it.
        info: from the adapter's `describe`.
    """

    def __init__(self, model: nn.Module, info: TargetInfo) -> None:
        self.model: Any = model
        self.info = info
        if len(self.make_cache()) != len(info.cache_kinds):
            raise UnsupportedModelError(
                f"{info.name} makes {len(self.make_cache())} caches, its config tells of "
                f"{len(info.cache_kinds)}",
                "load it from its folder",
            )
        self._parts = Parts.of(model) if info.can_tap else None
        self._taps = None if self._parts is None else _Taps(self._parts.layers)
        layers = None if self._parts is None else self._parts.layers
        self._prepare(model, info.name, getattr(model, "layers", ()), layers)

    @classmethod
    def sketch(cls, model: ModelInfo, dtype: mx.Dtype) -> tuple[Callable[..., Any], list[Any]]:
        """The model without weights, to be run lazily, and fresh caches."""
        return sketch(model, dtype)

    @classmethod
    def why_not_quantized_kv(cls, model: ModelInfo, settings: KVQuantization) -> str:
        """Why the caches of a model cannot be packed so; empty where they can."""
        return why_not_quantized_kv(model, settings)

    def tap(self, layers: Sequence[int]) -> None:
        """Choose the layers whose outputs are returned as features.

        Raises:
            UsageError: a layer that the model does not have, or no hidden states to be had.
        """
        outside = [layer for layer in layers if not 0 <= layer < self.info.num_layers]
        if outside:
            raise UsageError(f"no layers {outside} to tap, the model has {self.info.num_layers}")
        if self._taps is not None:
            self._taps.set(layers)
        elif layers:
            raise self._refuse()

    def _forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        logits = self.model(tokens, cache=cache)
        return TargetOutput(logits, None if self._taps is None else self._taps.take())

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, T, D] as the first layer gets them."""
        if self._parts is None:
            raise self._refuse()
        return self._parts.embed(tokens)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of normed hidden states [..., D]."""
        if self._parts is None:
            raise self._refuse()
        return self._parts.head(hidden)

    def make_cache(self) -> list[Any]:
        """Fresh caches, as mlx-lm makes them."""
        return make_prompt_cache(self.model)

    def close(self) -> None:
        """Put every replaced layer, attention module and projection back."""
        if self._taps is not None:
            self._taps.clear()
        self._put_back()

    def _refuse(self) -> UsageError:
        reason = self.info.why_no_taps
        return UsageError(
            f"the hidden states of {self.info.model_type} models cannot be taken"
            + (f": {reason}" if reason else ""),
            "use a drafter that needs none, as prompt-lookup or autoregressive",
        )
