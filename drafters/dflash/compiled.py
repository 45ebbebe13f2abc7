"""A drafter's pass over a block, traced once and replayed: the kernel operation ``compiled-draft``.

What `mx.compile` is given are the embeddings of the block, where the context ends, and the
context's buffers at their allocated length; it gives hidden states and the buffers. The projection
of features, the embedding and the head stay outside.

``compiled-draft=ahead`` also launches the next draft before the host has read how many tokens were
kept: the features of the whole block and that number, still on the device, are inputs too. All
rows go into the buffers; those past the end of what was kept are free rows like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import ComponentInfo
from draftloom.device import on_cuda
from draftloom.kernel_settings import OFF, KernelSettings
from draftloom.kernels.backend import row_entries
from draftloom.kernels.check import Check
from draftloom.row_writes import write_rows
from draftloom.traces import Traces

from .context import NOWHERE, ContextCache
from .model import DFlashLayer, DFlashModel

__all__ = [
    "MOST_TRACES",
    "OPERATION",
    "CompiledBlock",
    "TracedContext",
    "ahead",
    "compiled_block",
    "on",
]

OPERATION, AHEAD = "compiled-draft", "ahead"
MOST_TRACES = 16
"""Forms whose graphs are kept; the one that was not used for longest goes first."""
_log = logging.getLogger("draftloom.kernels")


class TracedContext(ContextCache):
    """A context at an offset that is an array.

    Args:
        like: has the same sinks and window.
        arrays: keys and values [B, heads, rows, size] as allocated, with room for the block.
        offset: int32 without axes (MLX-CUDA takes one for an offset of every row), committed
            positions.
    """

    def __init__(self, like: tuple[int, int | None], arrays: list[mx.array], offset: Any) -> None:
        super().__init__(*like)
        self.arrays = arrays
        self.offset = offset

    @property
    def held(self) -> Any:
        """Positions kept now, int32 without axes."""
        return self.offset if self.limit is None else mx.minimum(self.offset, self.limit)

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """All of them: whoever traces has seen to it that there is room."""
        return [(0, tokens)]

    def put(self, start: Any, keys: mx.array, values: mx.array) -> None:
        """As `ContextCache.put`, without an end to the context."""
        both = zip(self.arrays, (keys, values), strict=True)
        self.arrays = [write_rows(old, new, start) for old, new in both]

    def advance(self, tokens: Any) -> None:
        """Count positions; how many may be on the device alone."""
        self.offset = self.offset + tokens

    def with_block(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All rows of the context's keys and values, a block [B, heads, T, size] behind them."""
        self.put(self.held, keys, values)
        return self.arrays[0], self.arrays[1]

    def positions(self, tokens: int, length: int) -> mx.array:
        """As `ContextCache.positions`."""
        row = mx.arange(length)
        position = row
        if self.limit is not None:
            assert self.window is not None
            last = self.offset - 1
            in_ring = last - (last - row) % max(self.window, 1)
            wrapped = mx.where(row < self.sinks, row, in_ring)
            position = mx.where(self.offset > self.limit, wrapped, row)
        position = mx.where(row < self.held, position, row - self.held + self.offset)
        return mx.where(row < self.held + tokens, position, NOWHERE)


class CompiledBlock:
    """The traces of one network, whose weights are final.

    Args:
        network: loaded.
        ahead: whether drafts may be launched before it is known what they go on from.

    Attributes:
        ahead: as above.
        replayed: passes that were one call.
    """

    def __init__(self, network: DFlashModel, ahead: bool = False) -> None:
        self._network = network
        self.ahead = ahead
        self._traces: Traces[Callable[..., list[mx.array]]] = Traces(MOST_TRACES)
        self.replayed = 0
        # What is lazy would be computed again in every pass.
        owned = [value for module in network.modules() for _, value in module.items()]
        mx.eval([value for value in owned if isinstance(value, mx.array)])

    @property
    def traced(self) -> int:
        """Passes that were traced so far."""
        return self._traces.traced

    def run(
        self, embeddings: mx.array, cache: Sequence[ContextCache], rows: slice
    ) -> mx.array | None:
        """Normed hidden states [B, n, D] of these rows of a block [B, T, D], as the network gives
        them; None over an empty context, which the network runs itself.

        Raises:
            Exception: what tracing raises; the context is as before.
        """
        if not all(entry.arrays for entry in cache):
            return None
        return self._replay(embeddings, cache, rows, [])

    def run_ahead(
        self,
        features: mx.array,
        count: mx.array,
        embeddings: mx.array,
        cache: Sequence[ContextCache],
        rows: slice,
    ) -> mx.array | None:
        """The same over a context that is longer by the first `count` ([1] int32) of the features
        [1, S, F]. Its buffers hold them afterwards; who knows the number has to count them
        (`advance`). None where the context is empty, or may have no room for all of them.

        Raises:
            Exception: what tracing raises; the context is as before.
        """
        more = features.shape[1] + embeddings.shape[1]
        for entry in cache:
            full = entry.limit is not None and entry.offset + more > entry.limit
            if full or not entry.arrays:
                return None
        return self._replay(embeddings, cache, rows, [features, count])

    def _replay(
        self,
        embeddings: mx.array,
        cache: Sequence[ContextCache],
        rows: slice,
        extra: list[mx.array],
    ) -> mx.array:
        offset, more = cache[0].offset, extra[0].shape[1] if extra else 0
        for entry in cache:
            entry.reserve(embeddings.shape[1] + more)
        taken = [entry.arrays for entry in cache]
        # Of one network's buffers no more than the rows can differ.
        kinds = tuple([(entry.sinks, entry.window) for entry in cache])
        lengths = tuple([arrays[0].shape[2] for arrays in taken])
        given = tuple([(array.shape, array.dtype) for array in (embeddings, *extra)])
        trace = self._traces.of(
            (given, rows.start, rows.stop, lengths, kinds), partial(self._trace, kinds, rows)
        )
        for entry in cache:
            entry.arrays = []  # nobody but the graph holds them: they are written where they lie
        try:
            buffers = [list(arrays) for arrays in taken]  # MLX leaves placeholders where it fails
            start = mx.full((row_entries(1),), offset, dtype=mx.int32)
            hidden, *found = trace(embeddings, start, buffers, extra)
        except BaseException:
            for entry, arrays in zip(cache, taken, strict=True):
                entry.arrays = arrays
            raise
        del taken, buffers
        for entry, keys, values in zip(cache, found[::2], found[1::2], strict=True):
            entry.arrays = [keys, values]
        self.replayed += 1
        return hidden

    def _trace(
        self, kinds: Sequence[tuple[int, int | None]], rows: slice
    ) -> Callable[..., list[mx.array]]:
        network = self._network

        def run(
            x: mx.array, offset: mx.array, given: list[list[mx.array]], extra: list[mx.array]
        ) -> list[mx.array]:
            pairs, start = zip(kinds, given, strict=True), offset[:1].squeeze(0)
            contexts: list[Any] = [TracedContext(kind, arrays, start) for kind, arrays in pairs]
            if extra:
                features, count = extra
                network.extend(features, contexts)
                end = (offset + count)[:1].squeeze(0)
                for context in contexts:
                    context.offset = end
            hidden = network(x, contexts, rows)
            return [hidden, *(array for context in contexts for array in context.arrays)]

        traced: Callable[..., list[mx.array]] = mx.compile(run)
        return traced


def compiled_block(
    network: Any, description: DrafterDescription, settings: KernelSettings
) -> CompiledBlock | None:
    """The traces of a network, empty; None where ``compiled-draft`` does not run, or, said in the
    log, where its layers are others than DFlash's or it cannot be traced.

    Args:
        network: loaded and packed.
        description: of the checkpoint.
        settings: the switches.
    """
    choice = settings.use(OPERATION, off=OFF)
    level = logging.INFO if choice is None else logging.WARNING
    if choice is None:
        choice = ahead.name if ahead.by_default() else OFF
    if choice == OFF:
        return None
    early, reason = choice == AHEAD, ""
    plain = all(type(layer) is DFlashLayer for layer in network.layers)
    if not plain or type(network).__call__ is not DFlashModel.__call__:
        reason = "the drafter has other layers than DFlash's"
    else:
        compiled = CompiledBlock(network)
        cache = network.make_cache()
        dtype = network.norm.weight.dtype
        try:
            size = description.hidden_size
            features = mx.zeros((1, 2, len(description.tap_layers) * size), dtype=dtype)
            network.extend(features, cache)
            block, rows = mx.zeros((1, 4, size), dtype=dtype), slice(1, 4)
            compiled.run(block, cache, rows)
            if early:
                count = mx.array([1], dtype=mx.int32)
                compiled.run_ahead(features, count, block, cache, rows)
            return CompiledBlock(network, early)
        except Exception as error:  # noqa: BLE001 said below
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    _log.log(level, "%s: drafts run as they are: %s", OPERATION, reason)
    return None


class On:
    """An implementation of the operation.

    Args:
        name: of it.
        summary: for listings.
    """

    SLOW_CHECKS = True

    def __init__(self, name: str, summary: str) -> None:
        self.name = name
        self.info = ComponentInfo(f"{OPERATION}/{name}", summary)

    def by_default(self) -> bool:
        """Whether `auto` runs it here."""
        return self.name == AHEAD and on_cuda()

    @staticmethod
    def checks() -> Iterator[Check]:
        """Positions and rows at an offset that is an array, compiled, against those at a number."""
        for layers in (1, 6):
            yield Check(
                f"rows float32 L{layers} offset 5",
                partial(_placed, layers, traced=True),
                partial(_placed, layers, traced=False),
                (1e-5,) * 2,
            )
        for sinks, window, offset in ((0, None, 5), (2, 4, 5), (2, 4, 11), (0, 4, 9)):
            yield Check(
                f"positions int32 S{sinks} N{window} offset {offset}",
                partial(_traced, sinks, window, offset),
                partial(_plain, sinks, window, offset),
                (0.0,),
            )


on = On("on", "a drafter's pass over a block is traced once and replayed")
ahead = On(AHEAD, "the same, and launched before the host knows what the draft goes on from")


def _placed(layers: int, *, traced: bool) -> list[mx.array]:
    """Keys of all layers rotated, and those of the first in a buffer."""
    keys = mx.random.normal((layers, 2, 3, 64), key=mx.random.key(5))
    buffer = mx.random.normal((1, 2, 16, 64), key=mx.random.key(6))

    def rotated(offset: Any) -> mx.array:
        how: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0}
        return mx.fast.rope(keys, 64, offset=offset, **how)

    def run(start: mx.array) -> list[mx.array]:
        offset = start[:1].squeeze(0)
        found = rotated(offset)
        return [found, write_rows(buffer, found[:1], offset)]

    if traced:
        given: list[mx.array] = mx.compile(run)(mx.full((row_entries(1),), 5, dtype=mx.int32))
        return given
    found = rotated(5)
    parts = [buffer[..., :5, :], found[:1], buffer[..., 8:, :]]
    return [found, mx.concatenate(parts, axis=2)]


def _traced(sinks: int, window: int | None, offset: int) -> list[mx.array]:
    def run(at: mx.array) -> mx.array:
        return TracedContext((sinks, window), [], at).positions(3, 16)

    found: mx.array = mx.compile(run)(mx.array([offset]))
    return [found.astype(mx.float32)]


def _plain(sinks: int, window: int | None, offset: int) -> list[mx.array]:
    cache = ContextCache(sinks, window)
    cache.advance(offset)
    return [cache.positions(3, 16).astype(mx.float32)]
