"""Builds, caches and launches the kernels of :mod:`.source` for one backend."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from .source import Variant
from .tape import Tape

__all__ = ["Backend", "Geometry", "Launcher", "Request", "geometry_for", "unsupported_shape"]

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
    if request.tokens < 1:
        return "T = 0: there is nothing to run"
    return None


@attrs.frozen
class Geometry:
    """How the state is spread over threads (see :mod:`.source`).

    Attributes:
        lanes: lanes that share a row of the state; a power of two, and 4 * lanes divides Dk.
        rows: rows of the state a lane holds.
        simds: simdgroups in a threadgroup.
        tile: tokens staged at once.
    """

    lanes: int = 8
    rows: int = 1
    simds: int = 4
    tile: int = 16

    @property
    def threadgroup_rows(self) -> int:
        """Rows of the state that one threadgroup serves."""
        return self.simds * (32 // self.lanes) * self.rows

    def threadgroup_bytes(self, key_size: int) -> int:
        """Threadgroup memory, at most, in bytes (Metal allows 32,768)."""
        return 4 * self.tile * (2 * key_size + self.threadgroup_rows + 2)


def geometry_for(key_size: int, tokens: int) -> Geometry:
    """The geometry used for a key size: the best measured, within 32 KiB of threadgroup memory."""
    del tokens
    return Geometry(tile=16 if key_size <= 192 else 8)


@attrs.frozen
class Backend:
    """A compiler of kernels.

    Attributes:
        name: "metal" or "cuda".
        build: ``mx.fast.metal_kernel`` or ``mx.fast.cuda_kernel``.
        prelude: the header handed over with every body.
    """

    name: str
    build: Callable[..., Callable[..., list[mx.array]]]
    prelude: str

    def kernel(self, variant: Variant) -> Callable[..., list[mx.array]]:
        """The kernel of a variant; compiled by MLX at its first launch for each set of template
        values.
        """
        return _build(self, variant)

    def kernel_name(self, variant: Variant) -> str:
        """The variant's name with a digest of its source.

        MLX's CUDA backend keeps compiled kernels on disk under their name and template values
        alone, so a changed source needs a changed name.
        """
        digest = hashlib.sha256((self.prelude + variant.source).encode()).hexdigest()
        return f"{variant.name}_{digest[:12]}"


@lru_cache(maxsize=64)
def _build(backend: Backend, variant: Variant) -> Callable[..., list[mx.array]]:
    return backend.build(
        name=backend.kernel_name(variant),
        input_names=variant.inputs,
        output_names=variant.outputs,
        source=variant.source,
        header=backend.prelude,
    )


@lru_cache(maxsize=256)
def _template(
    dtypes: tuple[mx.Dtype, ...], sizes: tuple[int, ...], geometry: Geometry
) -> list[tuple[str, Any]]:
    """Template values. Every input dtype is among them: MLX-CUDA tells kernels apart by name and
    template alone.
    """
    key_heads, value_heads, key_size, value_size = sizes
    named = [("QT", dtypes[0])] + [(f"IN{i}", dtype) for i, dtype in enumerate(dtypes[1:])]
    return [
        *named,
        ("Hk", key_heads),
        ("Hv", value_heads),
        ("Dk", key_size),
        ("Dv", value_size),
        ("LANES", geometry.lanes),
        ("ROWS", geometry.rows),
        ("SIMDS", geometry.simds),
        ("TILE", geometry.tile),
    ]


@attrs.frozen
class Launcher:
    """The operations of the package on one backend; arguments and shapes as in :mod:`.array`.

    Attributes:
        backend: who compiles.
        geometry: a fixed geometry, or None for :func:`geometry_for`.
        poison: fill outputs with this value first (tests find unwritten elements so); None leaves
            them as allocated.
    """

    backend: Backend
    geometry: Geometry | None = None
    poison: float | None = None

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
        """Run a block and record the tape; the state after it only if ``write_state``, else None."""
        variant = Variant(block=True, tape=True, masked=mask is not None, end=write_state)
        out = self._run(variant, state, block=(q, k, v, g, beta), mask=mask)
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
        variant = Variant(block=True, masked=mask is not None, end=True)
        out = self._run(variant, state, block=(q, k, v, g, beta), mask=mask)
        return out["y"], out["state_out"]

    def replay(self, state: mx.array, tape: Tape, n: int | mx.array) -> mx.array:
        """Bring a state forward by n entries; bit-equal to the state :meth:`verify` had after n
        tokens.
        """
        out = self._run(Variant(replay=True, middle=True), state, tape=(tape, n))
        return out["state_middle"]

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
        """Replay n entries of the last cycle's tape, then run this cycle's block, in one launch.

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
        variant = Variant(
            replay=True,
            block=True,
            tape=True,
            masked=mask is not None,
            middle=True,
            end=write_state,
        )
        out = self._run(variant, state, block=block, mask=mask, tape=(previous, n))
        tape = _tape(out["delta_out"], block[1], block[3], mask)
        return out["y"], tape, out["state_middle"], out.get("state_out")

    def _run(
        self,
        variant: Variant,
        state: mx.array,
        *,
        block: tuple[mx.array, ...] = (),
        mask: mx.array | None = None,
        tape: tuple[Tape, int | mx.array] | None = None,
    ) -> dict[str, mx.array]:
        inputs: list[mx.array] = []
        if tape is not None:
            inputs += [tape[0].delta, tape[0].k, tape[0].g, _counts(*tape)]
        inputs += [*block, state]
        if mask is not None:
            inputs.append(mask)
        rows, value_heads, value_size, key_size = state.shape
        key_heads = block[1].shape[2] if block else tape[0].k.shape[2]
        tokens = block[4].shape[1] if block else tape[0].length
        geometry = self.geometry or geometry_for(key_size, tokens)
        y_type = block[0].dtype if block else mx.float32
        shapes = {
            "y": (rows, tokens, value_heads, value_size),
            "delta_out": (rows, tokens, value_heads, value_size),
        }
        names = variant.outputs
        outputs = self.backend.kernel(variant)(
            inputs=inputs,
            template=_template(
                (y_type, *(x.dtype for x in inputs)),
                (key_heads, value_heads, key_size, value_size),
                geometry,
            ),
            grid=(32, value_size // geometry.threadgroup_rows * geometry.simds, rows * value_heads),
            threadgroup=(32, geometry.simds, 1),
            output_shapes=[shapes.get(name, state.shape) for name in names],
            output_dtypes=[y_type if name == "y" else mx.float32 for name in names],
            init_value=self.poison,
        )
        return dict(zip(names, outputs, strict=True))


def _counts(tape: Tape, n: int | mx.array) -> mx.array:
    if isinstance(n, mx.array):
        return n.astype(mx.int32)
    if not 0 <= n <= tape.length:
        raise ValueError(f"cannot replay {n} entries of a tape of {tape.length}")
    return mx.full((tape.delta.shape[0],), n, dtype=mx.int32)


def _tape(delta: mx.array, k: mx.array, g: mx.array, mask: mx.array | None) -> Tape:
    if mask is None:
        return Tape(delta=delta, k=k, g=g)
    return Tape(
        delta=delta,
        k=mx.where(mask[:, :, None, None], k, mx.array(0, k.dtype)),
        g=mx.where(mask[:, :, None], g, mx.array(1, g.dtype)),
    )
