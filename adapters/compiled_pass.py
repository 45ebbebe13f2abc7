"""A pass of the target that is traced once and replayed: the kernel operation ``compiled-pass``.

MLX builds the graph of a pass anew each time, in Python. `mx.compile` keeps the graph of the first
pass of each form; later ones are one call. Whatever changes from pass to pass is an input of that
call (tokens, the caches' offset and arrays), whatever the pass changes is an output. The weights
are part of the graph: where somebody exchanges one, or a module, it is traced again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from operator import getitem, is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from draftloom.contracts import CacheKind, ComponentInfo, TargetInfo, TargetOutput
from draftloom.device import on_cuda
from draftloom.kernel_settings import OFF, KernelSettings
from draftloom.kernels.backend import row_entries
from draftloom.kernels.check import Check
from draftloom.recording import RecordingEntry
from draftloom.traces import Traces

from .early_launch import OPERATION as EARLY_LAUNCH
from .traced_caches import Forms, Port, TracedKVCache, port_of

__all__ = ["MODEL_TYPES", "MOST_TOKENS", "MOST_TRACES", "OPERATION", "CompiledPass", "on"]

OPERATION = "compiled-pass"
MODEL_TYPES = (
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen2", "qwen3", "qwen3_moe", "llama", "mistral",
)  # fmt: skip
"""Model types whose compiled passes are tested against plain mlx-lm."""
MOST_TOKENS = 32
"""A pass over more, as a prompt is, runs as it is."""
MOST_TRACES = 32
"""Forms whose graphs are kept; the one that was not used for longest goes first."""
_KINDS = (CacheKind.ATTENTION, CacheKind.GATED_DELTA)
NO_PARTS: tuple[Sequence[Any], Sequence[Any], Sequence[Any]] = ((), (), ())
_log = logging.getLogger("draftloom.kernels")

Forward = Callable[[mx.array, list[Any]], TargetOutput]


class On:
    """The operation's one implementation."""

    name = "on"
    info = ComponentInfo(f"{OPERATION}/on", "a pass is traced once and replayed")
    SLOW_CHECKS = True

    @staticmethod
    def by_default() -> bool:
        """Whether `auto` compiles passes here: where launches count, for the targets of
        `pays_for`. On the CPU MLX's own share is the larger one."""
        return on_cuda()

    @staticmethod
    def pays_for(target: TargetInfo) -> bool:
        """Whether it was timed for targets like this: hybrids with gated-delta layers. Others
        attend over all rows that are allocated, which nobody timed on a GPU yet."""
        return CacheKind.GATED_DELTA in target.cache_kinds

    @staticmethod
    def why_not_for(target: TargetInfo) -> str | None:
        """Why a target's passes run as they are; None where they may be compiled."""
        if target.model_type not in MODEL_TYPES:
            return f"{target.model_type} was not tested with compiled passes"
        others = sorted({str(kind) for kind in target.cache_kinds if kind not in _KINDS})
        return f"it has {', '.join(others)} caches" if others else None

    @staticmethod
    def why_not_with(settings: KernelSettings) -> str | None:
        """Why passes run as they are beside other choices; None where they may be compiled."""
        if not settings.use(EARLY_LAUNCH, off=""):
            return None
        return "early launches ask for parts of a pass while it is put together"

    @staticmethod
    def checks() -> Iterator[Check]:
        """Writing, masking and attending at an offset that is an array, compiled, against slices
        at a number."""
        for held, tokens in ((3, 1), (60, 4)):
            yield Check(
                f"attention float32 N{held} T{tokens}",
                partial(_attend, held, tokens, traced=True),
                partial(_attend, held, tokens, traced=False),
                (1.6e-2,) * 2,
            )


on = On()


def _attend(held: int, tokens: int, *, traced: bool) -> list[mx.array]:
    keys, values, new, queries = (
        mx.random.normal((1, 2, rows, 64), key=key)
        for rows, key in zip(
            (64, 64, tokens, tokens), mx.random.split(mx.random.key(3), 4), strict=True
        )
    )

    def at(keys: mx.array, values: mx.array, offset: mx.array) -> list[mx.array]:
        cache = TracedKVCache(keys, values, offset)
        mask = cache.make_mask(tokens)
        k, v = cache.update_and_fetch(new, new)
        y = mx.fast.scaled_dot_product_attention(queries, k, v, scale=0.125, mask=mask)
        return [y, k]

    if traced:
        given: list[mx.array] = mx.compile(at)(keys, values, mx.array([held]))
        return given
    end = held + tokens
    k, v = (
        mx.concatenate([x[..., :held, :], new, x[..., end:, :]], axis=2) for x in (keys, values)
    )
    mask = mx.arange(end)[None] <= held + mx.arange(tokens)[:, None]
    y = mx.fast.scaled_dot_product_attention(
        queries, k[..., :end, :], v[..., :end, :], scale=0.125, mask=mask
    )
    return [y, k]


class _Trace:
    """The graph of all passes of one form."""

    def __init__(
        self, forward: Forward, forms: Sequence[Any], counts: Sequence[int], known: Forms
    ) -> None:
        ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.layouts: list[tuple[int, Any]] = []
        self.has_features = False

        def run(tokens: mx.array, offset: mx.array, arrays: list[mx.array]) -> list[mx.array]:
            offset = offset[:1].squeeze(0)  # no axis: MLX-CUDA takes one for an offset of every row
            caches = [
                form.trace(arrays[first:last], offset)
                for form, (first, last) in zip(forms, pairwise(ends), strict=True)
            ]
            output = forward(tokens, caches)
            self.layouts, self.has_features = [], output.features is not None
            given = [output.logits]
            if output.features is not None:
                given.append(output.features)
            for form, cache in zip(forms, caches, strict=True):
                found, layout = form.results(cache, known)
                self.layouts.append((len(found), layout))
                given += found
            return given

        self.run: Callable[..., list[mx.array]] = mx.compile(run)


class CompiledPass:
    """The traces of one model.

    Args:
        model: as the adapter runs it, stand-ins included.
        name: for messages.

    Attributes:
        why_not: why no pass is compiled; empty while they are.
        replayed: passes that were one call.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self._name = name
        self._chosen = False  # by name
        self._tried = False
        self._traces: Traces[_Trace] = Traces(MOST_TRACES)
        self._known: Forms = {}
        self._parts: tuple[Sequence[Any], Sequence[Any], Sequence[Any]] = NO_PARTS
        self.why_not = "it is off"
        self.replayed = 0

    @property
    def traced(self) -> int:
        """Passes that were traced so far."""
        return self._traces.traced

    def tune(self, settings: KernelSettings, info: TargetInfo) -> None:
        """Compile passes, or not, as ``compiled-pass`` is chosen; by default on CUDA. Drops what
        was traced."""
        self.clear()
        use = settings.use(OPERATION, off=OFF)
        self._chosen, self._tried = use is not None, False
        if not (use != OFF if self._chosen else on.by_default() and on.pays_for(info)):
            self.why_not = "it is off"
            return
        self.why_not = on.why_not_for(info) or on.why_not_with(settings) or ""
        self._say()

    def clear(self) -> None:
        """Drop what was traced, and the weights that it holds."""
        self._traces.clear()
        self._known.clear()
        self._parts = NO_PARTS

    def run(self, forward: Forward, tokens: mx.array, cache: list[Any]) -> TargetOutput | None:
        """The pass, caches written; None where it is to run as it is.

        Args:
            forward: the pass as it is; it is traced.
            tokens: [B, T] int32.
            cache: what the pass is given, one entry a layer.

        Raises:
            Exception: what the pass raises while it is traced; the caches are as before it.
        """
        if self.why_not or tokens.shape[1] > MOST_TOKENS:
            return None
        rows, count = tokens.shape
        ports, offset = _ports(count, rows, cache)
        if ports is None:
            return None
        self._look_for_exchanges()
        form = (rows, count, tokens.dtype, *[port.form for port in ports])
        taken = [port.take() for port in ports]
        try:
            trace = self._traces.of(form, partial(self._trace, forward, ports, taken))
            # A list of its own: MLX leaves placeholders in it where tracing fails.
            start = mx.full((row_entries(1),), offset, dtype=mx.int32)
            given = trace.run(tokens, start, [*chain.from_iterable(taken)])
        except BaseException:
            for port, arrays in zip(ports, taken, strict=True):
                port.put_back(arrays)
            raise
        del taken  # nobody but the graph holds them now: buffers are written where they lie
        first = 1 + trace.has_features
        for port, (size, layout) in zip(ports, trace.layouts, strict=True):
            last = first + size
            port.store(given[first:last], layout, count)
            first = last
        self.replayed += 1
        return TargetOutput(given[0], given[1] if trace.has_features else None)

    def try_out(self, forward: Forward, make_cache: Callable[[], list[Any]]) -> None:
        """Before the first pass: trace passes of one token and of several, recorded and not, on
        caches that are never computed. What cannot be traced is said once, and runs as it is."""
        if self.why_not or self._tried:
            return
        self._tried = True
        cache = make_cache()
        try:
            forward(mx.zeros((1, 2), dtype=mx.int32), cache)
            for tokens in (1, 3):
                entries = [_recording(entry) if tokens > 1 else entry for entry in cache]
                self.run(forward, mx.zeros((1, tokens), dtype=mx.int32), entries)
        except Exception as error:  # noqa: BLE001 said, and kept in `why_not`
            self.why_not = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._say()
        self.clear()
        self._traces, self.replayed = Traces(MOST_TRACES), 0

    def _look_for_exchanges(self) -> None:
        """Drop every trace if a weight or a module is another than when they were traced."""
        owners, keys, parts = self._parts
        try:
            same = all(map(is_, map(getitem, owners, keys), parts))
        except LookupError:  # it is not there any more
            same = False
        if not same:
            _log.info("%s of %s: a module or a weight was exchanged", OPERATION, self._name)
            self.clear()

    def _trace(
        self, forward: Forward, ports: Sequence[Port], taken: Sequence[list[mx.array]]
    ) -> _Trace:
        if not self._parts[0]:
            owners, keys, parts = zip(*_parts_of(self._model), strict=True)
            self._parts = owners, keys, parts
            # What is lazy would be computed again in every pass.
            mx.eval([part for part in parts if isinstance(part, mx.array)])
        counts = [len(arrays) for arrays in taken]
        return _Trace(forward, [port.form for port in ports], counts, self._known)

    def _say(self) -> None:
        if self.why_not:
            said = "%s: passes of %s run as they are: %s"
            level = logging.WARNING if self._chosen else logging.INFO
            _log.log(level, said, OPERATION, self._name, self.why_not)


def _ports(tokens: int, rows: int, cache: list[Any]) -> tuple[list[Port] | None, int]:
    """The ports of a pass over [B, T] tokens, and where its key/value caches end; None where one
    has no port, or they end at different places."""
    ports: list[Port] = []
    end: int | None = None
    for entry in cache:
        port = port_of(entry, tokens, rows)
        if isinstance(port, str):
            return None, 0
        ports.append(port)
        if port.offset is not None:
            if end not in (None, port.offset):
                return None, 0
            end = port.offset
    return ports, end or 0


def _recording(entry: Any) -> Any:
    return RecordingEntry(entry) if isinstance(entry, ArraysCache) else entry


def _parts_of(value: Any, seen: set[int] | None = None) -> Iterator[tuple[Any, Any, Any]]:
    """(owner, key, part) of every array and module below a module, private ones included, and of
    the lists and tables that hold them."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(part, mx.array | dict | list | tuple):
            yield value, key, part
        if isinstance(part, dict | list | tuple):
            yield from _parts_of(part, seen)
