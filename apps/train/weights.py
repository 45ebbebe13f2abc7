"""The drafter's weights at the beginning of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from draftloom.drafters.dflash.model import DFlashModel
from draftloom.errors import ModelError

__all__ = ["in_order", "initial_parameters", "read_parameters"]


def in_order(parameters: Any) -> Any:
    """The same tree with its names in order: sums over all of it then round the same way, whether
    it was made here or read from a file."""
    flat: Any = tree_flatten(parameters)
    return tree_unflatten(sorted(flat, key=lambda item: item[0]))


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


def read_parameters(model: DFlashModel, checkpoint: Path) -> Any:
    """float32 weights of a drafter's checkpoint; packed ones are unpacked.

    Raises:
        ModelError: files missing or corrupt, or tensors that do not fit the config.
    """
    try:
        arrays: dict[str, mx.array] = {}
        for file in sorted(checkpoint.glob("model*.safetensors")):
            loaded: Any = mx.load(str(file))
            arrays.update(loaded)
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        plain = _unpack(arrays, config.get("quantization") or {})
        model.load_weights([(name, w.astype(mx.float32)) for name, w in plain.items()])
        mx.eval(model.parameters())
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"the weights in {checkpoint} cannot be loaded: {' '.join(str(error).split())[:300]}",
            "is the download complete, and do config and weights belong together?",
        ) from error
    return model.parameters()


def _unpack(arrays: dict[str, mx.array], settings: dict[str, Any]) -> dict[str, mx.array]:
    """Plain tensors. `settings` are mlx-lm's, which may name single layers."""
    plain = {}
    for name, value in arrays.items():
        stem, _, kind = name.rpartition(".")
        if f"{stem}.scales" not in arrays:
            plain[name] = value
        elif kind == "weight":
            layer = settings.get(stem)
            own: dict[str, Any] = layer if isinstance(layer, dict) else settings
            plain[name] = mx.dequantize(
                value,
                arrays[f"{stem}.scales"],
                arrays.get(f"{stem}.biases"),
                group_size=own.get("group_size", settings["group_size"]),
                bits=own["bits"],
                mode=own.get("mode", settings.get("mode", "affine")),
            )
    return plain
