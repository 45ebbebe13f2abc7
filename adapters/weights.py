"""Weights and tokenizer of a model folder, through mlx-lm, with errors a user can act on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
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
from draftloom.memory import WeightEstimate
from draftloom.model_info import ModelInfo

from .hub import Hub, again, check_config
from .weight_files import INDEX, StoredTensor, check_weight_files, explain, file_of, read_header

__all__ = ["SMALL_MODEL", "compute_dtype", "estimate", "load"]

SMALL_MODEL = 1_000_000_000
"""Parameters below which a model is unpacked, and `auto` chooses the type by the device."""
GROUP_BYTES = 2**28
"""Weights that are read from disk at once."""
_FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
BYTE_NAN = 255
"""The scale of mxfp4, mxfp8 and nvfp4 that is no number."""


def load(model: ModelInfo, dtype: str) -> LoadedModel | None:
    """Load a model folder.

    Args:
        model: its config.
        dtype: ``auto`` keeps the stored types, except that models below `SMALL_MODEL` parameters
            are computed in float32 on a CPU (exact for any number of rows) and in bfloat16 on a
            GPU. ``stored`` takes everything as it is stored, as mlx-lm does: nothing is cast or
            unpacked. A type's name casts to that type. Except with ``stored``, models below
            `SMALL_MODEL` are unpacked where they are stored quantized: for them packing saves
            space, not time.

    Returns:
        None for a model without a folder.

    Raises:
        ModelError: files missing, half there, corrupt, or not fitting the config; numbers that
            are not finite; a quantization that this device cannot compute.
    """
    if model.path is None:
        return None
    check_config(model.name, model.config)
    Hub().complete(model.path)
    tensors = check_weight_files(model.path)
    _refuse_what_needs_a_gpu(model, tensors)
    try:
        module, config = load_mlx_model(model.path, lazy=True)
        module = _cast(module, dtype)
        bad = _evaluate(module)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise explain(error, model.path, tensors) from error
    if bad:
        stored = file_of(bad, tensors)
        raise ModelError(
            f"{model.path if stored is None else stored.file}: tensor {bad} holds numbers that "
            "are not finite",
            "download it again, or convert it again" if stored is None else again(stored.file),
        )
    return LoadedModel(module, _tokenizer(model.path, config))


def estimate(model: ModelInfo, dtype: str) -> WeightEstimate | None:
    """What `load` will hold of a folder; None for what is not there (yet), or no folder."""
    if model.path is None:
        return None
    tensors = [t for file in model.path.glob("model*.safetensors") for t in read_header(file)]
    told = _size_in_index(model.path)
    if told > sum(t.size for t in tensors):  # not (all) downloaded yet
        return WeightEstimate(told, compute_dtype(dtype, SMALL_MODEL) or mx.bfloat16)
    if not tensors:
        return None
    packed = {t.name.removesuffix(".scales") for t in tensors if t.name.endswith(".scales")}
    settings = model.config.get("quantization") or {}
    parameters = sum(_count(t, packed, settings) for t in tensors)
    target = compute_dtype(dtype, parameters)
    unpack = target is not None and parameters < SMALL_MODEL
    stored = next((_FLOATS[t.dtype] for t in tensors if t.dtype in _FLOATS), mx.bfloat16)
    size = 0
    for tensor in tensors:
        stem, _, kind = tensor.name.rpartition(".")
        if unpack and stem in packed and kind in ("weight", "scales", "biases"):
            size += _count(tensor, packed, settings) * target.size  # type: ignore[union-attr]
        elif target is not None and tensor.dtype in _FLOATS:
            size += math.prod(tensor.shape) * target.size
        else:
            size += tensor.size
    return WeightEstimate(size, target or stored)


def _size_in_index(path: Path) -> int:
    """Bytes of all shards as the index tells; 0 where it does not."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        return int(index["metadata"]["total_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _count(tensor: StoredTensor, packed: set[str], settings: Mapping[str, Any]) -> int:
    """Parameters that a tensor stands for; scales and biases of a packed one stand for none."""
    stem, _, kind = tensor.name.rpartition(".")
    if stem not in packed:
        return math.prod(tensor.shape)
    if kind != "weight":
        return 0
    own = settings.get(stem)
    bits = (own if isinstance(own, Mapping) else settings).get("bits", 4)
    return math.prod(tensor.shape) * 32 // int(bits)


def _refuse_what_needs_a_gpu(model: ModelInfo, tensors: Iterable[StoredTensor]) -> None:
    """Packed weights that MLX has no CPU code for, told from the config and the headers."""
    if mx.default_device() != mx.Device(mx.cpu):
        return
    scaled = next((t for t in tensors if t.name.endswith(".global_scale")), None)
    if model.config.get("quantize_activations"):
        what = f"{model.name} quantizes activations (quantize_activations in its config.json)"
    elif scaled is not None:
        what = f"{scaled.file} holds nvfp4 weights with a global scale ({scaled.name})"
    else:
        return
    raise ModelError(
        f"{what}, which MLX computes on a GPU only",
        "use another quantization of the model: affine, mxfp4, mxfp8, or nvfp4 without it",
    )


def compute_dtype(dtype: str, parameters: int) -> mx.Dtype | None:
    """The type to compute in, None to keep what is stored.

    Args:
        dtype: ``auto``, ``stored`` or a type's name.
        parameters: of the model.
    """
    if dtype == "stored":
        return None
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
    scaled = any(name.endswith(".global_scale") for name, _ in _parameters(module))
    if packed and parameters < SMALL_MODEL and not scaled:
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


def _evaluate(module: nn.Module) -> str:
    """Bring every weight into memory, some at a time, and look at each: the name of the first
    that is not finite, empty where all are.

    A sum is not finite where one of its terms is not: one pass, while the tensor is at hand. (A sum
    may also overflow; what looks bad is looked at again.)
    """
    group: list[tuple[str, mx.array]] = []
    items = _parameters(module)
    for index, (name, value) in enumerate(items):
        group.append((name, value))
        last = index + 1 == len(items)
        if not last and sum(v.nbytes for _, v in group) < GROUP_BYTES:
            continue
        sums = [_sum(n, v) for n, v in group]
        mx.eval([v for _, v in group], sums)
        for (suspect, tensor), total in zip(group, sums, strict=True):
            if not math.isfinite(float(total)) and not _finite(suspect, tensor):
                return suspect
        group.clear()
    return ""


def _sum(name: str, value: mx.array) -> mx.array:
    if _is_byte_scale(name, value):
        return mx.where(value == BYTE_NAN, mx.nan, 0.0).sum()
    if not mx.issubdtype(value.dtype, mx.floating):
        return mx.array(0.0)
    return value.sum().astype(mx.float32)


def _finite(name: str, value: mx.array) -> bool:
    return not _is_byte_scale(name, value) and bool(mx.isfinite(value).all().item())


def _is_byte_scale(name: str, value: mx.array) -> bool:
    """Scales of mxfp4, mxfp8 and nvfp4 are bytes, of which one is no number."""
    return value.dtype == mx.uint8 and name.endswith(".scales")


def _tokenizer(path: Path, config: dict[str, Any]) -> Any:
    if not any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return tokenizer_utils.load(path, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
