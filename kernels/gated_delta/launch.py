"""Builds, caches and launches the kernels of :mod:`.source` for one backend."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher, per_row, row_entries

from .source import Variant
from .tape import Tape

__all__ = [
    "Backend",
    "Geometry",
    "Launcher",
    "Request",
    "geometry_for",
    "row_counts",
    "unsupported_shape",
]

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_GRID_LIMIT = 65535  # CUDA's limit on the z extent of a grid


@attrs.frozen
class Request:
    """What a call asks of a kernel.

    Attributes:
        operation: "verify", "replay", "replay_verify" or "prefill".
        dtype: dtype of q, k and v (of the tape's keys for "replay").
        batch: B.
        tokens: T.
        key_heads: Hk.
        value_heads: Hv.
        key_size: Dk.
        value_size: Dv.
        device: "cpu" or "gpu", the default device.
        vector_gate: whether every key channel has a decay of its own.
    """

    operation: str
    dtype: mx.Dtype
    batch: int
    tokens: int
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    device: str
    vector_gate: bool = False


def unsupported_shape(request: Request) -> str | None:
    """Why the kernel body cannot serve a request's shape or dtype, or None if it can."""
    for name, size in (("Dk", request.key_size), ("Dv", request.value_size)):
        if size % 32 or not 32 <= size <= 256:
            return f"{name} = {size}: the kernel needs a multiple of 32 up to 256"
    if request.value_heads % request.key_heads:
        return f"Hv = {request.value_heads} is not a multiple of Hk = {request.key_heads}"
    if request.dtype not in _FLOATS:
        return f"dtype {request.dtype}: the kernel takes float32, float16 and bfloat16"
    if request.batch * request.value_heads > _GRID_LIMIT:
        return f"B * Hv = {request.batch * request.value_heads} exceeds a grid's {_GRID_LIMIT}"
    if request.vector_gate:
        return "a decay for every key channel: the kernel takes one a head"
    if request.tokens < 1:
        return "T = 0: there is nothing to run"
    return None


@attrs.frozen(cache_hash=True)
class Geometry:
    """How the state is spread over threads (see :mod:`.source`).

    Attributes:
        lanes: lanes that share a row of the state; a power of two, and 4 * lanes divides Dk.
        rows: rows of the state a lane holds.
        simds: simdgroups in a threadgroup.
        tile: tokens staged at once.
        unroll: tokens whose instructions may be interleaved (CUDA only).
    """

    lanes: int = 8
    rows: int = 1
    simds: int = 4
    tile: int = 16
    unroll: int = 1

    @property
    def threadgroup_rows(self) -> int:
        """Rows of the state that one threadgroup serves."""
        return self.simds * (32 // self.lanes) * self.rows

    def threadgroup_bytes(self, key_size: int) -> int:
        """Threadgroup memory, at most, in bytes (Metal allows 32,768)."""
        return 4 * self.tile * (2 * key_size + self.threadgroup_rows + 3)


def geometry_for(key_size: int, memory: int) -> Geometry:
    """The geometry used for a key size: the best measured on an H100 that fits.

    All have the same number of lanes, so all add in the same order and give the same bits.

    Args:
        key_size: Dk.
        memory: threadgroup memory that may be used, bytes.
    """
    for tried in (Geometry(simds=8, tile=32), Geometry(tile=16)):
        if tried.threadgroup_bytes(key_size) <= memory:
            return tried
    return Geometry(tile=8)


@attrs.frozen
class _Plan:
    """What is the same in every launch on equal shapes and dtypes."""

    kernel: Callable[..., list[mx.array]]
    arguments: dict[str, Any]
    outputs: tuple[str, ...]


@lru_cache(maxsize=1024)
def _plan(
    backend: Backend,
    geometry: Geometry | None,
    variant: Variant,
    dtypes: tuple[mx.Dtype, ...],
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> _Plan:
    """Plan a launch; ``shapes`` are those of k (or the tape's), v (or its delta) and the state."""
    (_, _, key_heads, key_size), rows_shape, state_shape = shapes
    rows, _, value_heads, value_size = rows_shape
    geometry = geometry or geometry_for(key_size, backend.memory)
    y_dtype = dtypes[variant.inputs.index("q")] if variant.block else mx.float32
    wide = ("y", "delta_out")
    template = [
        ("QT", y_dtype),
        ("Hk", key_heads),
        ("Hv", value_heads),
        ("Dk", key_size),
        ("Dv", value_size),
        ("LANES", geometry.lanes),
        ("ROWS", geometry.rows),
        ("SIMDS", geometry.simds),
        ("TILE", geometry.tile),
        ("UNROLL", geometry.unroll),
    ]
    groups = value_size // geometry.threadgroup_rows
    return _Plan(
        kernel=backend.kernel(variant, dtypes, template),
        arguments={
            "template": template,
            "grid": (32, groups * geometry.simds, rows * value_heads),
            "threadgroup": (32, geometry.simds, 1),
            "output_shapes": [rows_shape if n in wide else state_shape for n in variant.outputs],
            "output_dtypes": [y_dtype if n == "y" else mx.float32 for n in variant.outputs],
        },
        outputs=tuple(variant.outputs),
    )


_REPLAY = Variant(replay=True, middle=True)
_variant = lru_cache(maxsize=64)(Variant)


@attrs.frozen
class Launcher(KernelLauncher):
    """The operations of the package on one backend; arguments and shapes as in :mod:`.dispatch`.

    Attributes:
        geometry: a fixed geometry, or None for :func:`geometry_for`.
    """

    geometry: Geometry | None = None

    def verify(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array,
        mask: mx.array | None = None,
        *,
        write_state: bool = True,
    ) -> tuple[mx.array, Tape, mx.array | None]:
        """Run a block and record the tape; the state after it if ``write_state``, else None."""
        variant = _variant(block=True, tape=True, masked=mask is not None, end=write_state)
        out = self._run(variant, [q, k, v, g, beta, state], k, v, mask)
        return out["y"], _tape(out["delta_out"], k, g, mask), out.get("state_out")

    def prefill(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        g: mx.array,
        beta: mx.array,
        state: mx.array,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Run T tokens without a tape; bit-equal to :meth:`verify`, in any split of the tokens."""
        variant = _variant(block=True, masked=mask is not None, end=True)
        out = self._run(variant, [q, k, v, g, beta, state], k, v, mask)
        return out["y"], out["state_out"]

    def replay(self, state: mx.array, tape: Tape, n: int | mx.array) -> mx.array:
        """Bring a state forward; bit-equal to the state :meth:`verify` had after n tokens."""
        counts = row_counts(n, state.shape[0])
        inputs = [tape.delta, tape.k, tape.g, counts, state]
        return self._run(_REPLAY, inputs, tape.k, tape.delta)["state_middle"]

    def replay_verify(
        self,
        previous: Tape,
        n: int | mx.array,
        block: tuple[mx.array, mx.array, mx.array, mx.array, mx.array],
        state: mx.array,
        mask: mx.array | None = None,
        *,
        write_state: bool = False,
    ) -> tuple[mx.array, Tape, mx.array, mx.array | None]:
        """Replay n entries of the last tape, then run this block, in one launch.

        Args:
            previous: the tape recorded on ``state``.
            n: entries of it to keep, one number or [B] int32.
            block: q, k, v, g, beta of this cycle.
            state: the state before ``previous``.
            mask: [B, T] bool of this cycle, or None.
            write_state: whether to write the state after the block too.

        Returns:
            y, this cycle's tape, the state between (what the new tape was recorded on), the state
            after or None.
        """
        variant = _variant(
            replay=True,
            block=True,
            tape=True,
            masked=mask is not None,
            middle=True,
            end=write_state,
        )
        counts = row_counts(n, state.shape[0])
        inputs = [previous.delta, previous.k, previous.g, counts, *block, state]
        out = self._run(variant, inputs, block[1], block[2], mask)
        tape = _tape(out["delta_out"], block[1], block[3], mask)
        return out["y"], tape, out["state_middle"], out.get("state_out")

    def _run(
        self,
        variant: Variant,
        inputs: list[mx.array],
        keys: mx.array,
        rows: mx.array,
        mask: mx.array | None = None,
    ) -> dict[str, mx.array]:
        """Launch: ``inputs`` end with the state; ``keys`` and ``rows`` give the shapes."""
        shapes = (keys.shape, rows.shape, inputs[-1].shape)
        if mask is not None:
            inputs.append(mask)
        dtypes = tuple([x.dtype for x in inputs])
        plan = _plan(self.backend, self.geometry, variant, dtypes, shapes)
        outputs = plan.kernel(inputs=inputs, **plan.arguments, **self.fill)
        return dict(zip(plan.outputs, outputs, strict=True))


def row_counts(n: int | Sequence[int] | mx.array, rows: int) -> mx.array:
    """How many tape entries each row keeps, as the kernels want it.

    Every layer of a model keeps the same number. Numbers on the host are turned into an array once;
    the layers share it.

    Args:
        n: one number, one for each row, or an int32 array of at least ``rows`` entries.
        rows: B.

    Returns:
        [max(B, 4)] int32; entries past B mean nothing.
    """
    if isinstance(n, mx.array):
        return per_row(n, rows)
    return _constant_counts((n,) * rows if isinstance(n, int) else tuple(n), rows)


@lru_cache(maxsize=64)
def _constant_counts(numbers: tuple[int, ...], rows: int) -> mx.array:
    size = row_entries(rows)
    padded = mx.array([*numbers, *[0] * (size - len(numbers))], dtype=mx.int32)
    # The sum is for the device to do: what the host wrote lies in memory that a kernel waits for.
    counts = padded + mx.zeros((size,), dtype=mx.int32)
    mx.async_eval(counts)
    return counts


def _tape(delta: mx.array, k: mx.array, g: mx.array, mask: mx.array | None) -> Tape:
    if mask is None:
        return Tape(delta=delta, k=k, g=g)
    return Tape(
        delta=delta,
        k=mx.where(mask[:, :, None, None], k, mx.array(0, k.dtype)),
        g=mx.where(mask[:, :, None], g, mx.array(1, g.dtype)),
    )
