"""Verify attention inside a model: which calls a kernel takes, and mlx-lm's own for all others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from draftloom.device import on_gpu
from draftloom.kernel_settings import AUTO, OFF, KernelSettings
from draftloom.kernels.verify_attention import TIMED, Choice, Request, choose, cuda, metal
from draftloom.kernels.verify_attention import valid_lengths as lengths_of
from draftloom.kv_view import KVCacheView

from .attention_module import AttentionLayers, AttentionModule, Weighting, attend_stock

__all__ = ["OPERATION", "VerifyAttention", "tune_attention"]

OPERATION = "verify-attention"


class VerifyAttention:
    """Attends for all layers of one model.

    A kernel takes a call on a plain key/value cache, or a view of one, whose queries see themselves
    and all before them. It reads the cache's buffers where they lie, at their allocated length.
    Everything else (prompts, sliding windows, packed caches, masks of other kinds, shapes that the
    kernel does not take) is mlx-lm's own call.

    Args:
        use: an implementation to take where it serves; None chooses.
    """

    def __init__(self, use: Any = None) -> None:
        self._use = use
        self._choices: dict[Any, Choice] = {}
        self._lengths: tuple[tuple[int, int], mx.array] | None = None

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, cache: Any, how: Weighting
    ) -> mx.array:
        """[B, Hq, T, D] of queries [B, Hq, T, D]; keys and values as the cache gave them."""
        if not _is_causal(cache, how.mask, q.shape[2]):
            return attend_stock(q, k, v, cache, how)
        choice = self._choice(q, cache.keys, how.sinks is not None)
        if choice.name == "array" or not q.dtype == cache.keys.dtype == cache.values.dtype:
            return attend_stock(q, k, v, cache, how)
        lengths = self._valid(cache.offset, q.shape[0])
        return choice.run(q, cache.keys, cache.values, lengths, scale=how.scale, sinks=how.sinks)

    def _choice(self, q: mx.array, keys: mx.array, sinks: bool) -> Choice:
        gpu = on_gpu()
        key = (q.shape, q.dtype, keys.shape[1], sinks, gpu)
        found = self._choices.get(key)
        if found is None:
            rows, heads, queries, size = q.shape
            device = "gpu" if gpu else "cpu"
            request = Request(
                q.dtype, rows, queries, heads, keys.shape[1], size, device, sinks=sinks
            )
            found = self._choices[key] = choose(request, self._use)
        return found

    def _valid(self, length: int | mx.array, rows: int) -> mx.array:
        """One array for all layers of a pass: they end at the same length. Of a length that is an
        array, in a pass that is traced, each layer makes its own."""
        if isinstance(length, mx.array):
            return lengths_of(length, rows)
        if self._lengths is None or self._lengths[0] != (length, rows):
            self._lengths = ((length, rows), lengths_of(length, rows))
        return self._lengths[1]


def _is_causal(cache: Any, mask: Any, tokens: int) -> bool:
    """Whether the queries see themselves and all before them, nothing else.

    The models stood in for ask plain caches for no window (a contract test says so), so that a mask
    over all allocated rows of a view is the causal one that the view made.
    """
    if type(cache) is KVCache:
        return mask == "causal" if isinstance(mask, str) else mask is None and tokens == 1
    if not isinstance(cache, KVCacheView):
        return False
    if isinstance(mask, mx.array):
        return bool(mask.dtype == mx.bool_ and mask.shape == (tokens, cache.keys.shape[2]))
    return mask is None and tokens == 1


def tune_attention(layers: AttentionLayers, settings: KernelSettings) -> None:
    """Stand in for the attention of a model if another than mlx-lm's may serve a call; otherwise
    put its own modules back.

    Args:
        layers: of the model; where none has a known class, nothing is done.
        settings: the operation ``verify-attention``: ``auto`` takes a kernel only where it has been
            timed, a name takes it wherever it serves.
    """
    layers.restore()
    choice = settings.choice(OPERATION)
    here = {m.BACKEND.name for m in (metal, cuda) if m.why_not_here() is None}
    if not len(layers) or choice == OFF or (choice == AUTO and not here & TIMED):
        return
    attend = VerifyAttention(None if choice == AUTO else settings.use(OPERATION))
    layers.replace(lambda attention: AttentionModule(attention, attend))
