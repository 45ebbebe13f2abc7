"""Several linear layers over one input as one matrix product.

The rows of their weights lie side by side in one array; each layer's own weight becomes a slice of
it, a view of the same memory. So nothing is held twice, and a layer can be called alone as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.device import on_cuda
from draftloom.kernels import few_rows

__all__ = ["OneProduct", "ProductStack", "why_not"]

_ARRAYS = ("weight", "scales", "biases", "bias")
_ALIGNMENT = 16
"""Bytes. Kernels with wide loads read an array from a multiple of this; MLX's own arrays start at
one, a slice need not."""


def why_not(layers: Mapping[str, Any]) -> str | None:
    """None if these layers can be one product, else the reason why not.

    Args:
        layers: by name; all of them take the same input.
    """
    if len(layers) < 2:
        return "there is nothing to pack it with"
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, nn.QuantizedLinear):
            return f"{name} is a {type(layer).__name__}"
    kinds = {_kind(layer) for layer in layers.values()}
    for at, what in enumerate(("kind of layer", "input size", "type", "bias", "quantization")):
        if len({kind[at] for kind in kinds}) > 1:
            return f"{' and '.join(layers)} differ in {what}"
    return None


def _kind(layer: Any) -> tuple[Any, ...]:
    """What layers of one product have in common, in the order of the words in `why_not`."""
    dtypes = tuple((name, layer[name].dtype) for name in _names(layer))
    quantized = isinstance(layer, nn.QuantizedLinear)
    how = (layer.group_size, layer.bits, layer.mode) if quantized else None
    width = layer["weight"].shape[1] * (32 // layer.bits if quantized else 1)
    plain = tuple(pair for pair in dtypes if pair[0] != "bias")
    return type(layer), width, plain, dict(dtypes).get("bias"), how


def _names(layer: Any) -> list[str]:
    return [name for name in _ARRAYS if layer.get(name) is not None]


class OneProduct:
    """Linear layers over one input as one product.

    Nothing of the layers is changed until `adopt`.

    Args:
        layers: `nn.Linear` or `nn.QuantizedLinear`, at least two; see `why_not`.

    Attributes:
        sizes: outputs of each layer.
        few_rows: the implementation of the operation of that name that runs it: MLX's own at first.

    Raises:
        ValueError: layers that cannot be one product; says why.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        reason = why_not({f"layer {i}": layer for i, layer in enumerate(layers)})
        if reason is not None:
            raise ValueError(f"no single product: {reason}")
        self._layers = list(layers)
        self.sizes = tuple(layer["weight"].shape[0] for layer in layers)
        self._ends = [sum(self.sizes[:i]) for i in range(1, len(self.sizes))]
        self._arrays: dict[str, mx.array] = {
            name: mx.concatenate([layer[name] for layer in layers], axis=0)
            for name in _names(layers[0])
        }
        self._slices: list[mx.array] = []
        self.few_rows: Any = "array"

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The joined arrays by name."""
        return self._arrays

    def adopt(self) -> None:
        """Make the arrays of every layer slices of the joined ones, which takes their memory."""
        mx.eval(self._arrays)
        self._take(self._arrays)

    def _take(self, arrays: dict[str, mx.array]) -> None:
        """Use these joined arrays, evaluated, and hand their rows to the layers."""
        self._arrays = arrays
        start = 0
        for layer, size in zip(self._layers, self.sizes, strict=True):
            for name, whole in self._arrays.items():
                layer[name] = whole[start : start + size]
            start += size
        mx.eval([[layer[name] for name in self._arrays] for layer in self._layers])
        self._slices = [layer["weight"] for layer in self._layers]
        mx.clear_cache()  # what the layers had is too small for the next product to reuse

    @property
    def current(self) -> bool:
        """Whether the layers still have the weights that were joined."""
        pairs = zip(self._layers, self._slices, strict=True)
        return all(layer["weight"] is weight for layer, weight in pairs)

    def release(self) -> None:
        """Leave the layers on their own. They keep their slices, but for those that start where
        wide loads cannot: those become arrays of their own."""
        if not self.current:
            return
        for layer, end in zip(self._layers[1:], self._ends, strict=True):
            for name, whole in self._arrays.items():
                if end * (whole.nbytes // whole.shape[0]) % _ALIGNMENT:
                    layer[name] = whole[mx.arange(end, end + layer[name].shape[0])]
                    mx.eval(layer[name])

    def __call__(self, x: mx.array) -> list[mx.array]:
        """What each layer gives [..., size] of x [..., D]: views of one array."""
        return _split(self.joined(x), self._ends)

    def joined(self, x: mx.array) -> mx.array:
        """The same as one array [..., N]."""
        return _product(x, self._arrays, self._layers[0], self.few_rows)


class ProductStack:
    """One product for each of L groups of layers of the same sizes, in one array [L, N, D].

    Besides each group's own product there is one over the last layers of all groups, for an input
    that they share. The memory of the layers is taken at once.

    Args:
        groups: L times the layers of a product; none has a bias.
        shared: how many layers of a group, counted from its end, can be run over all groups.

    Attributes:
        products: of each group.

    Raises:
        ValueError: layers that cannot be one product, or groups that differ; says why.
    """

    def __init__(self, groups: Sequence[Sequence[Any]], shared: int) -> None:
        self.products = [OneProduct(layers) for layers in groups]
        reason = self.why_not(groups)
        if reason is not None:
            raise ValueError(f"no stack of products: {reason}")
        self._like = groups[0][0]
        self._sizes = self.products[0].sizes[-shared:]
        names = list(self.products[0].arrays)
        self._arrays = {n: mx.stack([p.arrays[n] for p in self.products]) for n in names}
        mx.eval(self._arrays)
        for i, product in enumerate(self.products):
            # An index alone would copy; a slice is a view.
            rows = {name: whole[i : i + 1].squeeze(0) for name, whole in self._arrays.items()}
            mx.eval(rows)
            product._take(rows)

    @staticmethod
    def why_not(groups: Sequence[Sequence[Any]]) -> str | None:
        """None if these groups, each of them one product, can be a stack; else the reason."""
        kinds = {
            tuple((*_kind(layer), layer["weight"].shape[0]) for layer in layers)
            for layers in groups
        }
        if len(kinds) > 1:
            return "the layers differ in size or type"
        if any("bias" in layer for layers in groups for layer in layers):
            return "a layer has a bias"
        return None

    def over_all(self, x: mx.array) -> list[mx.array]:
        """What the shared layers of every group give of one x [B, T, D]: for each of them
        [L, B, T, size]."""
        rows, tokens, size = x.shape
        count = sum(self._sizes)
        arrays = {name: whole[:, -count:] for name, whole in self._arrays.items()}
        x = x.reshape(1, rows * tokens, size)
        if on_cuda() and isinstance(self._like, nn.QuantizedLinear):
            # MLX-CUDA has no product of one x with a batch of packed weights.
            each = [
                _product(x, {name: a[i] for name, a in arrays.items()}, self._like)
                for i in range(len(self.products))
            ]
            found = mx.concatenate(each, axis=0)
        else:
            found = _product(x, arrays, self._like)
        found = found.reshape(-1, rows, tokens, count)
        ends = [sum(self._sizes[:i]) for i in range(1, len(self._sizes))]
        return _split(found, ends)


def _split(x: mx.array, ends: list[int]) -> list[mx.array]:
    parts: Any = mx.split(x, ends, axis=-1)  # mlx's type says one array
    return list(parts)


def _product(
    x: mx.array, arrays: Mapping[str, mx.array], like: Any, few: Any = "array"
) -> mx.array:
    """x by the joined weights, with the operations of `nn.Linear` or `nn.QuantizedLinear`."""
    bias = arrays.get("bias")
    if not isinstance(like, nn.QuantizedLinear):
        if few != "array" and bias is None:
            return few_rows.product(x, arrays["weight"], use=few)
        weight = mx.swapaxes(arrays["weight"], -1, -2)
        return x @ weight if bias is None else mx.addmm(bias, x, weight)
    found = mx.quantized_matmul(
        x,
        arrays["weight"],
        scales=arrays["scales"],
        biases=arrays.get("biases"),
        transpose=True,
        group_size=like.group_size,
        bits=like.bits,
        mode=like.mode,
    )
    return found if bias is None else found + bias
