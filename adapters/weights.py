"""Weights and tokenizer of a model folder, through mlx-lm, with errors a user can act on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import tokenizer_utils
from mlx_lm.utils import dequantize_model, get_total_parameters
from mlx_lm.utils import load_model as load_mlx_model

from draftloom.contracts import LoadedModel
from draftloom.errors import ModelError
from draftloom.model_info import ModelInfo

from .hub import Hub, again, check_config

__all__ = ["SMALL_MODEL", "check_weight_files", "compute_dtype", "load"]

SMALL_MODEL = 1_000_000_000
"""Parameters below which a model is unpacked, and `auto` chooses the type by the device."""


def load(model: ModelInfo, dtype: str) -> LoadedModel | None:
    """Load a model folder.

    Args:
        model: its config.
        dtype: ``auto`` keeps the stored types, except that models below `SMALL_MODEL` parameters
            are computed in float32 on a CPU (exact for any number of rows) and in bfloat16 on a
            GPU. A type's name casts to that type. Models below `SMALL_MODEL` are unpacked where
            they are stored quantized: for them packing saves space, not time.

    Returns:
        None for a model without a folder.

    Raises:
        ModelError: files missing, half there, corrupt, or not fitting the config.
    """
    if model.path is None:
        return None
    check_config(model.name, model.config)
    Hub().complete(model.path)
    check_weight_files(model.path)
    try:
        module, config = load_mlx_model(model.path, lazy=True)
        module = _cast(module, dtype)
        mx.eval(module.parameters())
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the weights in {model.path} cannot be loaded: {reason[:300]}",
            "is the download complete, and do config and weights belong together?",
        ) from error
    _check_finite(module, model.path)
    return LoadedModel(module, _tokenizer(model.path, config))


def check_weight_files(path: Path) -> None:
    """See that a folder's safetensors are there and readable from end to end of their headers.

    Raises:
        ModelError: none there, a shard of the index missing, or a file cut short; names the file.
    """
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("model*.safetensors"))
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: {error}", again(index)) from error
        missing = sorted(name for name in names if not (path / name).is_file())
        if missing:
            raise ModelError(
                f"{path} lacks {missing[0]}, which its index names", "download it again"
            )
    if not files:
        raise ModelError(f"{path} has no model*.safetensors", "is the download complete?")
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header says how long the file must be: a cut download is seen without reading it all."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < size:
                raise ValueError("its header is cut short")
            header: dict[str, Any] = json.loads(stream.read(length))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        if expected != size:
            raise ValueError(f"it has {size} bytes, its header says {expected}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}", again(file)) from error


def compute_dtype(dtype: str, parameters: int) -> mx.Dtype | None:
    """The type to compute in, None to keep what is stored.

    Args:
        dtype: ``auto`` or a type's name.
        parameters: of the model.
    """
    if dtype != "auto":
        return getattr(mx, dtype)  # type: ignore[no-any-return]
    if parameters >= SMALL_MODEL:
        return None
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def _cast(module: nn.Module, dtype: str) -> nn.Module:
    parameters = get_total_parameters(module)
    target = compute_dtype(dtype, parameters)
    if target is None:
        return module
    packed = any(name.endswith(".scales") for name, _ in _parameters(module))
    if packed and parameters < SMALL_MODEL:
        module = dequantize_model(module)
    text = getattr(module, "language_model", module)
    keep = getattr(text, "cast_predicate", None) or (lambda path: True)

    def cast(path: str, value: Any) -> Any:
        floating = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(target) if floating and keep(path) else value

    cast_items = [(path, cast(path, value)) for path, value in _parameters(module)]
    module.load_weights(cast_items, strict=False)
    return module


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    return tree_flatten(module.parameters())  # type: ignore[return-value]


def _check_finite(module: nn.Module, path: Path) -> None:
    """Refuse weights that are not numbers. One pass over the small tensors, which a broken
    conversion spoils as well as the large ones."""
    small = [(n, a) for n, a in _parameters(module) if a.size <= 2**16 and _is_float(a)]
    flags = [mx.isfinite(a).all() for _, a in small]
    if not flags:
        return
    healthy: Any = mx.stack(flags).tolist()
    bad = [name for (name, _), ok in zip(small, healthy, strict=True) if not ok]
    if bad:
        raise ModelError(f"the weights in {path} are not finite: {bad[0]}", "download them again")


def _is_float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating)) and math.prod(array.shape) > 0


def _tokenizer(path: Path, config: dict[str, Any]) -> Any:
    if not any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return tokenizer_utils.load(path, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
