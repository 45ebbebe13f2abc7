"""Weights of a DFlash checkpoint, plain or packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from draftloom.errors import ModelError

from .config import DFlashConfig
from .model import DFlashModel

__all__ = ["load_weights"]


def load_weights(path: Path, config: DFlashConfig, dtype: mx.Dtype) -> DFlashModel:
    """The network of a checkpoint folder, in the type asked for; packed weights are unpacked
    (drafters are small).

    Raises:
        ModelError: files missing or corrupt, tensors that do not fit the config or are not finite;
            names the folder, and the tensor where one is to blame.
    """
    model = DFlashModel(config)
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ModelError(f"{path} has no model.safetensors", "is the download complete?")
    try:
        stored: dict[str, mx.array] = {}
        for file in files:
            arrays: Any = mx.load(str(file))
            stored.update(arrays)
        plain = _unpack(stored, config.quantization or {})
        model.load_weights([(name, value.astype(dtype)) for name, value in plain.items()])
        mx.eval(model.parameters())
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the drafter's weights in {path} cannot be loaded: {reason}",
            "is the download complete, and do config and weights belong together?",
        ) from error
    _check_finite(model, path)
    return model


def _unpack(stored: Mapping[str, mx.array], settings: Mapping[str, Any]) -> dict[str, mx.array]:
    """Plain tensors. `settings` are mlx-lm's quantization, which may name single layers."""
    plain: dict[str, mx.array] = {}
    for name, value in stored.items():
        stem, _, kind = name.rpartition(".")
        if f"{stem}.scales" not in stored:
            plain[name] = value
        elif kind == "weight":
            layer = settings.get(stem)
            own: Mapping[str, Any] = layer if isinstance(layer, dict) else settings
            plain[name] = mx.dequantize(
                value,
                stored[f"{stem}.scales"],
                stored.get(f"{stem}.biases"),
                group_size=own.get("group_size", settings["group_size"]),
                bits=own["bits"],
                mode=own.get("mode", settings.get("mode", "affine")),
            )
    return plain


def _check_finite(model: DFlashModel, path: Path) -> None:
    tensors: Any = tree_flatten(model.parameters())
    finite: Any = mx.stack([mx.isfinite(value).all() for _, value in tensors]).tolist()
    bad = [name for (name, _), ok in zip(tensors, finite, strict=True) if not ok]
    if bad:
        raise ModelError(f"the drafter's weights in {path} are not finite: {bad[0]}")
