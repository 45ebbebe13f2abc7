"""What adapters of mlx-lm models share: the model's parts, its caches, its description."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import _get_classes

from draftloom.contracts import CacheKind, TargetInfo, TargetOutput
from draftloom.errors import ModelError, UnsupportedModelError, UsageError
from draftloom.model_info import ModelInfo

from .taps import LayerTaps
from .tuned import TunedModel

__all__ = [
    "MlxLmAdapter",
    "cache_kind",
    "describe_model",
    "language_model",
    "make_skeleton",
    "sketch",
]


def language_model(model: nn.Module) -> Any:
    """The text part of a model: what has `args`, `model.layers` and the head."""
    return getattr(model, "language_model", model)


def make_skeleton(model: ModelInfo) -> tuple[Any, Any]:
    """A model made from its config, without weights, and the arguments of its text part.

    MLX makes arrays lazily, so that the skeleton holds none.

    Raises:
        ModelError: mlx-lm does not know the model type, or the config lacks what its class needs;
            names the file and the keys.
        UnsupportedModelError: mlx-lm cannot make such a model here.
    """
    try:
        config = copy.deepcopy(dict(model.config))  # mlx-lm's arguments rewrite nested tables
        model_class, args_class = _get_classes(config)
        skeleton = model_class(args_class.from_dict(config))
    except SystemExit as error:  # how mlx-lm says that a package is missing
        raise UnsupportedModelError(
            f"model type {model.model_type!r} of {model.name} needs a package that is not "
            "installed: mlx-lm ends the process instead of loading it",
            "what mlx-lm printed names the package",
        ) from error
    except (RuntimeError, ImportError) as error:
        raise UnsupportedModelError(
            f"mlx-lm cannot make a {model.model_type} model here: {_one_line(error)}",
            "it needs another device, or a package",
        ) from error
    except (
        KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError,
        AssertionError,
    ) as error:  # fmt: skip
        where = model.name if model.path is None else model.path / "config.json"
        lacking = _lacking(error)
        if lacking:
            raise ModelError(
                f"{where} lacks {lacking}, which a {model.model_type} model needs",
                "is it complete?",
            ) from error
        raise ModelError(
            f"{where} does not describe a {model.model_type} model: {_one_line(error)}",
            "is it complete?",
        ) from error
    text = language_model(skeleton)
    return skeleton, getattr(text, "args", getattr(skeleton, "args", None))


def sketch(model: ModelInfo, dtype: mx.Dtype) -> tuple[Callable[..., Any], list[Any]]:
    """A model without weights that computes in `dtype`, as (tokens, cache) -> logits, and fresh
    caches. What it gives is lazy, and is never to be computed.

    Raises:
        ModelError: see `make_skeleton`.
    """
    skeleton, _ = make_skeleton(model)
    skeleton.set_dtype(dtype)
    return (lambda tokens, cache: skeleton(tokens, cache=cache)), make_prompt_cache(skeleton)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _lacking(error: Exception) -> str:
    """The config keys that an error says are missing; empty where it is about something else."""
    if isinstance(error, KeyError):
        return repr(error.args[0]) if error.args else ""
    _, _, names = str(error).partition("required positional argument")
    return ", ".join(re.findall(r"'\w+'", names))


def describe_model(model: ModelInfo, adapter: str) -> tuple[TargetInfo, Any]:
    """Description and skeleton of a model that is laid out as Llama is.

    Raises:
        ModelError: see `make_skeleton`.
    """
    skeleton, args = make_skeleton(model)
    info = TargetInfo(
        name=model.name,
        adapter=adapter,
        model_type=model.model_type,
        hidden_size=int(args.hidden_size),
        vocab_size=int(args.vocab_size),
        num_layers=len(language_model(skeleton).model.layers),
        cache_kinds=tuple(cache_kind(cache) for cache in make_prompt_cache(skeleton)),
        context_limit=getattr(args, "max_position_embeddings", None),
    )
    return info, skeleton


def cache_kind(cache: Any) -> CacheKind:
    """What kind of cache an entry of mlx-lm's is."""
    kinds = {
        KVCache: CacheKind.ATTENTION,
        QuantizedKVCache: CacheKind.ATTENTION,
        RotatingKVCache: CacheKind.SLIDING_WINDOW,
        ArraysCache: CacheKind.RECURRENT,
    }
    return kinds.get(type(cache), CacheKind.OTHER)


class MlxLmAdapter(TunedModel):
    """A model of mlx-lm whose forward is used as it is.

    Args:
        model: as mlx-lm loaded it.
        info: from the adapter's `describe`.
    """

    def __init__(self, model: nn.Module, info: TargetInfo) -> None:
        self.model = model
        self.info = info
        self._text = language_model(model)
        self._taps = LayerTaps(self._text.model.layers)
        layers = self._text.model.layers
        self._prepare(model, info.name, layers, layers)

    def tap(self, layers: Sequence[int]) -> None:
        """Choose the layers whose outputs are returned as features.

        Raises:
            UsageError: a layer that the model does not have.
        """
        outside = [layer for layer in layers if not 0 <= layer < self.info.num_layers]
        if outside:
            raise UsageError(f"no layers {outside} to tap, the model has {self.info.num_layers}")
        self._taps.set(layers)

    def _forward(self, tokens: mx.array, cache: list[Any]) -> TargetOutput:
        logits = self.model(tokens, cache=cache)
        return TargetOutput(logits, self._taps.take())

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings [B, T, D]."""
        return self._text.model.embed_tokens(tokens)

    def head(self, hidden: mx.array) -> mx.array:
        """Logits [..., V] of normed hidden states [..., D]."""
        if self._text.args.tie_word_embeddings:
            return self._text.model.embed_tokens.as_linear(hidden)
        return self._text.lm_head(hidden)

    def make_cache(self) -> list[Any]:
        """Fresh caches, as mlx-lm makes them."""
        return make_prompt_cache(self.model)

    def close(self) -> None:
        """Put every replaced layer, attention module and projection back."""
        self._taps.clear()
        self._put_back()
