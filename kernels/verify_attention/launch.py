"""Builds, caches and launches the kernels of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher, per_row, row_entries

from .source import COMBINE_SIMDS, Combine, Partial
from .tensor import STAGES, TensorPartial

__all__ = [
    "MAX_QUERIES",
    "SIZES",
    "TIMED",
    "TIMED_SIZES",
    "Geometry",
    "Launcher",
    "Request",
    "chosen_geometry",
    "geometry_for",
    "tensor_geometry_for",
    "unsupported_shape",
    "valid_lengths",
]

SIZES = (64, 128, 256)
"""Head sizes that the kernel body takes."""
TIMED: frozenset[str] = frozenset({"cuda"})
"""Backends whose kernel is chosen without being asked for. Add one once
docs/benchmarks/verify_attention.py has shown there that it pays."""
TIMED_SIZES = (256,)
"""Head sizes that were timed: others wait for it likewise."""
MAX_QUERIES = 32
"""Most query tokens a row."""
_KINDS = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}
_GRID_LIMIT = 65535  # CUDA's limit on the z extent of a grid
_GROUPS = 132  # threadgroups to make of the keys: one for each multiprocessor of an H100
_TILE = 16 * 1024
_MOST_SPLITS = 64  # what the second pass adds up


@attrs.frozen
class Request:
    """What a call asks of a kernel.

    Attributes:
        dtype: of queries, keys and values.
        batch: B.
        queries: M.
        heads: Hq.
        key_heads: Hkv.
        size: D.
        device: "cpu" or "gpu", the default device.
        window: keys a query sees at most, or None.
        sinks: whether there is a sink a head.
    """

    dtype: mx.Dtype
    batch: int
    queries: int
    heads: int
    key_heads: int
    size: int
    device: str
    window: int | None = None
    sinks: bool = False


def unsupported_shape(request: Request) -> str | None:
    """Why the kernel body cannot serve a request's shape or dtype, or None if it can."""
    if request.size not in SIZES:
        return f"D = {request.size}: the kernel needs one of {SIZES}"
    if not 1 <= request.queries <= MAX_QUERIES:
        return f"M = {request.queries}: the kernel takes 1 to {MAX_QUERIES} query tokens"
    if request.heads % request.key_heads:
        return f"Hq = {request.heads} is not a multiple of Hkv = {request.key_heads}"
    if request.dtype not in _KINDS:
        return f"dtype {request.dtype}: the kernel takes float32, float16 and bfloat16"
    if request.batch * request.key_heads > _GRID_LIMIT:
        return f"B * Hkv = {request.batch * request.key_heads} exceeds a grid's {_GRID_LIMIT}"
    if request.window is not None and request.window < 1:
        return f"a window of {request.window} keys"
    return None


@attrs.frozen(cache_hash=True)
class Geometry:
    """How the work is spread over threads (see :mod:`.source`).

    Attributes:
        rows: packed query rows of a threadgroup; 16, 32 or 64.
        keys: keys staged at once; a multiple of 16.
        simds: simdgroups in a threadgroup; ``simds * 16 / rows`` of them share 16 rows, and divide
            ``keys / 8``.
        groups: threadgroups to split the keys for, all heads together.
        tensor: whether the first pass is :mod:`.tensor`'s. Then ``keys`` is a multiple of 32, and
            ``simds`` is ``rows / 8``.
        least: tiles of a part, at least.
    """

    rows: int
    keys: int
    simds: int
    groups: int = _GROUPS
    tensor: bool = False
    least: int = 1

    def threadgroup_bytes(self, size: int, item: int) -> int:
        """Threadgroup memory, bytes, for heads of ``size`` and numbers of ``item`` bytes."""
        if self.tensor:
            return STAGES * self.keys * size * item
        tile = self.keys * (size * item + 16)
        weights = self.rows * (self.keys * item + 16)
        return tile + weights + 4 * 16 * self.simds

    def splits(self, pairs: int, rows: int) -> int:
        """Most parts that the keys are cut into, for B * Hkv pairs of ``rows`` packed rows each."""
        tiles = -(-rows // self.rows)
        return max(1, min(self.groups // (pairs * tiles), _MOST_SPLITS))


def geometry_for(rows: int, size: int, item: int, memory: int) -> Geometry:
    """The geometry for so many packed rows, by arithmetic.

    A tile is 16 KB where that makes 16 to 64 keys: what a multiprocessor has to have on its way to
    read at full speed. Where it is less, there are more threadgroups to share one.

    Args:
        rows: Hq / Hkv * M.
        size: D.
        item: bytes of a number.
        memory: threadgroup memory that may be used, bytes.
    """
    height = _height(rows)
    keys = max(16, min(64, _TILE // (size * item)))
    while True:
        sharing = min(8 * 16 // height, keys // 8, 4)
        groups = _GROUPS * max(1, _TILE // (keys * size * item))
        tried = Geometry(height, keys, height // 16 * sharing, groups)
        if keys == 16 or tried.threadgroup_bytes(size, item) <= memory:
            return tried
        keys //= 2


def tensor_geometry_for(rows: int, size: int) -> Geometry:
    """The geometry on tensor cores: timed for 64 rows of heads of 256 on an H100, else likewise.

    Args:
        rows: Hq / Hkv * M.
        size: D.
    """
    height = _height(rows)
    keys = min(64, _TILE // (2 * size))
    groups = _GROUPS * (_TILE // (2 * size * keys))
    return Geometry(height, keys, height // 8, groups, tensor=True, least=2)


def chosen_geometry(backend: Backend, dtype: mx.Dtype, rows: int, size: int) -> Geometry:
    """What a launcher takes unless it is told another; tensor cores where there are."""
    if backend.name == "cuda" and dtype != mx.float32:
        return tensor_geometry_for(rows, size)
    return geometry_for(rows, size, dtype.size, backend.memory)


def _height(rows: int) -> int:
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


@attrs.frozen
class _Plan:
    """What is the same in every launch on equal shapes and dtypes."""

    kernels: tuple[Callable[..., list[mx.array]], Callable[..., list[mx.array]]]
    arguments: tuple[dict[str, Any], dict[str, Any]]


@lru_cache(maxsize=1024)
def _plan(
    backend: Backend,
    geometry: Geometry | None,
    dtype: mx.Dtype,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    scale: float,
    window: int | None,
    sinks: mx.Dtype | None,
) -> _Plan:
    """Plan a call; ``shapes`` are those of q and the keys."""
    (batch, heads, queries, size), (_, key_heads, allocated, _) = shapes
    rows, pairs = heads // key_heads * queries, batch * key_heads
    geometry = geometry or chosen_geometry(backend, dtype, rows, size)
    most = geometry.splits(pairs, rows)
    splits = min(most, -(-allocated // (geometry.least * geometry.keys)))
    shared = [("D", size), ("Hq", heads), ("Hkv", key_heads)]
    parts = (pairs, splits, rows)
    partial = TensorPartial(scale) if geometry.tensor else Partial(scale)
    combine = Combine(sinks is not None)
    dtypes = (dtype,) * 3
    seconds = (mx.float32,) * 3 + (() if sinks is None else (sinks,))
    first: dict[str, Any] = {
        "template": [
            ("CT", dtype),
            *([("KIND", _KINDS[dtype])] if geometry.tensor else []),
            *shared,
            ("RT", geometry.rows),
            ("BN", geometry.keys),
            ("SIMDS", geometry.simds),
            ("SPLITS", most),
            ("LEAST", geometry.least),
            ("WINDOW", window or 0),
        ],
        "grid": (32 * splits, geometry.simds * -(-rows // geometry.rows), pairs),
        "threadgroup": (32, geometry.simds, 1),
        "output_shapes": [(*parts, size), parts, parts],
        "output_dtypes": [mx.float32] * 3,
    }
    second: dict[str, Any] = {
        "template": [("QT", dtype), *shared, ("SPLITS", most)],
        "grid": (32, COMBINE_SIMDS * rows, pairs),
        "threadgroup": (32, COMBINE_SIMDS, 1),
        "output_shapes": [(batch, queries, heads, size)],
        "output_dtypes": [dtype],
    }
    kernels = (
        backend.kernel(partial, dtypes, first["template"]),
        backend.kernel(combine, seconds, second["template"]),
    )
    return _Plan(kernels, (first, second))


@attrs.frozen
class Launcher(KernelLauncher):
    """Verify attention on one backend; arguments and shapes as in :mod:`.dispatch`.

    Attributes:
        geometry: a fixed geometry, or None for :func:`chosen_geometry`.
    """

    geometry: Geometry | None = None

    def attend(
        self,
        q: mx.array,
        keys: mx.array,
        values: mx.array,
        lengths: int | mx.array,
        *,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """[B, Hq, M, D] in q's dtype, a view of [B, M, Hq, D] as it lies in memory."""
        shape = q.shape
        plan = _plan(
            self.backend,
            self.geometry,
            q.dtype,
            (shape, keys.shape),
            scale,
            window,
            None if sinks is None else sinks.dtype,
        )
        first, second = plan.arguments
        inputs = [q, keys, values, valid_lengths(lengths, shape[0])]
        parts = plan.kernels[0](inputs=inputs, **first, **self.fill)
        if sinks is not None:
            parts = [*parts, sinks]
        (out,) = plan.kernels[1](inputs=parts, **second, **self.fill)
        return out.transpose(0, 2, 1, 3)


def valid_lengths(lengths: int | mx.array, rows: int) -> mx.array:
    """How many keys of each row are valid, as the kernels want it; lazy.

    All layers of a pass see the same length: make it once and hand it to all of them.

    Args:
        lengths: one number, which may be an int32 array without axes, or an int32 array of at
            least ``rows`` entries.
        rows: B.

    Returns:
        [max(B, 4)] int32; entries past B mean nothing.
    """
    if not isinstance(lengths, mx.array) or not lengths.ndim:
        return mx.full((row_entries(rows),), lengths, dtype=mx.int32)
    return per_row(lengths, rows)
