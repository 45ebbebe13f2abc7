"""Parity checks of packed projections, on the default device: one product against separate ones, in
every type, for one token, a few and a block.

Tolerance: bit-equal on the CPU. A GPU may add in another order for another number of columns, and
multiplies float32 matrices in TF32 on CUDA.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.kernels.check import Check

from .product import OneProduct, ProductStack

__all__ = ["checks_of"]

SIZES = {
    "attention": (256, 64, 64),
    "context": (256, 64, 64),
    "gated-delta": (384, 128, 8, 8),
    "mlp": (320, 320),
}
"""Outputs of the layers of a place, by its kind."""
FORMS = ("float32", "bfloat16", "float16", "8-bit", "4-bit")
WIDTH, WIDTHS, LAYERS = 128, (1, 5, 16), 3
TOLERANCES = {mx.float32: 5e-3, mx.float16: 5e-3, mx.bfloat16: 2e-2}


def checks_of(kinds: Collection[str]) -> Iterator[Check]:
    """All checks of these kinds of places."""
    for kind in sorted(kinds):
        for form in FORMS:
            yield _check(kind, form)


def _check(kind: str, form: str) -> Check:
    groups = [_layers(form, SIZES[kind], seed) for seed in range(LAYERS)]
    dtype = getattr(mx, form, mx.bfloat16)
    inputs = [
        mx.random.normal((1, width, WIDTH), key=mx.random.key(width)).astype(dtype)
        for width in WIDTHS
    ]
    shared = 2 if kind == "context" else len(SIZES[kind])

    def expected() -> list[mx.array]:
        return [_joined([[l(x) for l in group[-shared:]] for group in groups]) for x in inputs]  # noqa: E741

    def found() -> list[mx.array]:
        if kind == "context":
            stack = ProductStack(groups, shared)
            return [mx.concatenate(stack.over_all(x), axis=-1) for x in inputs]
        products = [OneProduct(group) for group in groups]
        for product in products:
            product.adopt()
        return [_joined([product(x) for product in products]) for x in inputs]

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    tolerance = 0.0 if on_cpu else TOLERANCES[dtype]
    tokens = ", ".join(map(str, WIDTHS))
    label = f"{kind} {form} T {tokens} of {WIDTH} to {'+'.join(map(str, SIZES[kind]))}"
    return Check(label, found, expected, (tolerance,) * len(inputs), f"one product: {label}")


def _joined(groups: Sequence[Sequence[mx.array]]) -> mx.array:
    """[L, B, T, N] of what L groups of layers give."""
    return mx.stack([mx.concatenate([*parts], axis=-1) for parts in groups])


def _layers(form: str, sizes: Sequence[int], seed: int) -> list[Any]:
    made: list[Any] = []
    keys = iter(mx.random.split(mx.random.key(seed), len(sizes)))
    for size in sizes:
        layer: Any = nn.Linear(WIDTH, size, bias=False)
        layer.weight = mx.random.normal((size, WIDTH), key=next(keys)) * WIDTH**-0.5
        layer.set_dtype(getattr(mx, form, mx.bfloat16))
        made.append(layer)
    if "bit" in form:
        made = [layer.to_quantized(group_size=64, bits=int(form[0])) for layer in made]
    mx.eval([layer.parameters() for layer in made])
    return made
