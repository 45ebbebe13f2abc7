"""Plans and launches the kernel of :mod:`.source` for one backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import attrs
import mlx.core as mx

from draftloom.kernels.backend import Backend, KernelLauncher

from .layer import Layer, Prepared, Projected
from .source import Variant

__all__ = ["Launcher", "Request", "unsupported"]

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_TAPS = 8


@attrs.frozen
class Request:
    """What a call asks of a kernel.

    Attributes:
        dtype: of qkv.
        before: dtype of the rows before it.
        taps: of the convolution, W + 1.
        biased: whether the convolution adds a bias.
        key_heads, value_heads, key_size, value_size: Hk, Hv, Dk, Dv.
        device: "cpu" or "gpu", the default device.
    """

    dtype: mx.Dtype
    before: mx.Dtype
    taps: int
    biased: bool
    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    device: str


def unsupported(request: Request) -> str | None:
    """Why the kernel body cannot serve a request, or None if it can."""
    for name, size in (("Dk", request.key_size), ("Dv", request.value_size)):
        if size % 32 or not 32 <= size <= 256:
            return f"{name} = {size}: the kernel needs a multiple of 32 up to 256"
    if request.dtype not in _FLOATS:
        return f"dtype {request.dtype}: the kernel takes float32, float16 and bfloat16"
    if request.before != request.dtype:
        return f"the cache holds {request.before}, the layer computes in {request.dtype}"
    if not 2 <= request.taps <= _TAPS:
        return f"{request.taps} taps: the kernel takes 2 to {_TAPS}"
    if request.biased:
        return "the convolution has a bias"
    return None


@attrs.frozen
class _Plan:
    """What is the same in every launch on equal shapes and dtypes."""

    kernel: Callable[..., list[mx.array]]
    arguments: dict[str, Any]


@lru_cache(maxsize=512)
def _plan(
    backend: Backend,
    variant: Variant,
    dtypes: tuple[mx.Dtype, ...],
    shape: tuple[int, int],
    sizes: tuple[int, int, int, int, int],
) -> _Plan:
    (rows, tokens), (taps, key_heads, value_heads, key_size, value_size) = shape, sizes
    heads = 2 * key_heads + value_heads
    simds = next(n for n in (4, 2, 1) if heads % n == 0)
    channels = 2 * key_heads * key_size + value_heads * value_size
    keys = (rows, tokens, key_heads, key_size)
    gates = (rows, tokens, value_heads)
    template = [
        ("QT", dtypes[0]),
        ("Hk", key_heads),
        ("Hv", value_heads),
        ("Dk", key_size),
        ("Dv", value_size),
        ("KW", taps),
        ("SIMDS", simds),
    ]
    return _Plan(
        kernel=backend.kernel(variant, dtypes, template, strided=True),
        arguments={
            "template": template,
            "grid": (32 * rows * tokens, heads, 1),
            "threadgroup": (32, simds, 1),
            "output_shapes": [
                keys,
                keys,
                (*gates, value_size),
                gates,
                gates,
                (rows, tokens + taps - 1, channels),
            ],
            "output_dtypes": [*[dtypes[0]] * 3, mx.float32, mx.float32, dtypes[0]],
        },
    )


@attrs.frozen
class Launcher(KernelLauncher):
    """The operation on one backend."""

    def prepare(
        self,
        layer: Layer,
        projected: Projected,
        before: mx.array | None,
        mask: mx.array | None = None,
    ) -> Prepared:
        """As :func:`..dispatch.prepare`, in one launch."""
        qkv, a, b = projected
        weight: mx.array = layer.conv.weight  # type: ignore[assignment]
        rows, tokens, channels = qkv.shape
        taps = weight.shape[1]
        if before is None:
            before = mx.zeros((rows, taps - 1, channels), dtype=qkv.dtype)
        inputs = [qkv, before, weight, a, b, layer.a_log, layer.dt_bias]
        if mask is not None:
            inputs.append(mask)
        plan = _plan(
            self.backend,
            Variant(mask is not None),
            tuple([x.dtype for x in inputs]),
            (rows, tokens),
            (taps, layer.key_heads, layer.value_heads, layer.key_size, layer.value_size),
        )
        return Prepared(*plan.kernel(inputs=inputs, **plan.arguments, **self.fill))
