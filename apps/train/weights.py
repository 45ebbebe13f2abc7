"""The drafter's weights at the beginning of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from draftloom.drafters.dflash.model import DFlashModel

__all__ = ["apart", "in_a_row", "in_order", "initial_parameters"]


def in_order(parameters: Any) -> Any:
    """The same tree with its names in order: sums over all of it then round the same way, whether
    it was made here or read from a file."""
    flat: Any = tree_flatten(parameters)
    return tree_unflatten(sorted(flat, key=lambda item: item[0]))


def in_a_row(arrays: Sequence[mx.array]) -> mx.array:
    """All numbers of some arrays in one."""
    return mx.concatenate([array.reshape(-1) for array in arrays])


def apart(row: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
    """The arrays of these shapes whose numbers lie in a row."""
    ends = [0]
    for array in like:
        ends.append(ends[-1] + array.size)
    parts = mx.split(row, ends[1:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, like, strict=True)]


def initial_parameters(model: DFlashModel, seed: int) -> Any:
    """Weights of a new drafter, float32: norms are 1, matrices normal with deviation
    1 / sqrt(3 inputs). From a key of their own: no global random state is read."""
    flat: Any = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    weights = []
    for (name, value), key in zip(flat, keys, strict=True):
        if value.ndim == 1:
            fresh = mx.ones(value.shape, dtype=mx.float32)
        else:
            fresh = mx.random.normal(value.shape, key=key) / math.sqrt(3 * value.shape[-1])
        weights.append((name, fresh))
    mx.eval([w for _, w in weights])
    return tree_unflatten(weights)
