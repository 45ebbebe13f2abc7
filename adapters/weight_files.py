"""Safetensors files by their headers: are they whole, what is in which, and what was meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from draftloom.errors import ModelError

from .hub import again

__all__ = ["INDEX", "StoredTensor", "check_weight_files", "explain", "file_of", "read_header"]

INDEX = "model.safetensors.index.json"
_SHAPES = re.compile(r"Expected shape (\(.*?\)) but received shape (\(.*?\)) for parameter (\S+)")
_NAMES = re.compile(r"(Missing|Received) \d+ parameters[^\n]*\n([^,\n]+?)[,.]?(?:\n|$)")


@attrs.frozen
class StoredTensor:
    """A tensor as a header tells of it.

    Attributes:
        name: in the file.
        file: which holds it.
        dtype: safetensors' name of the type (``BF16``).
        shape: sizes.
        size: bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    size: int


def check_weight_files(path: Path) -> list[StoredTensor]:
    """See that a folder's safetensors are there and as long as their headers say.

    Returns:
        Every tensor of every file.

    Raises:
        ModelError: none there, a shard of the index missing, a tensor not where the index says,
            or a file cut short; names the file.
    """
    index = path / INDEX
    files = sorted(path.glob("model*.safetensors"))
    placed: dict[str, str] = {}
    if index.is_file():
        try:
            placed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            names = sorted(set(placed.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} cannot be read: {error}", again(index)) from error
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"{path} lacks {missing[0]}, which its index names", "download it again"
            )
    if not files:
        raise ModelError(f"{path} has no model*.safetensors", "is the download complete?")
    found = [tensor for file in files for tensor in read_header(file)]
    _check_index(path, placed, found)
    return found


def _check_index(path: Path, placed: dict[str, str], found: Iterable[StoredTensor]) -> None:
    held = {(tensor.file.name, tensor.name) for tensor in found}
    files = {file for file, _ in held}
    for name, file in placed.items():
        if file in files and (file, name) not in held:
            raise ModelError(
                f"{path / file} lacks tensor {name}, which the index places there",
                "index and shards are of two downloads: download them again",
            )


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file. The header says how long the file must be: a cut download is seen
    without reading it all.

    Raises:
        ModelError: it is not a whole safetensors file; names it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < size:
                raise ValueError("its header is cut short")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(name, file, str(entry["dtype"]), tuple(entry["shape"]), end - begin)
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
        expected = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        if expected != size:
            raise ValueError(f"it has {size} bytes, its header says {expected}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}", again(file)) from error
    return tensors


def file_of(name: str, tensors: Iterable[StoredTensor]) -> StoredTensor | None:
    """The stored tensor that a model's parameter was made of; families rename them while loading,
    so that the longest common end of the names decides. None where nothing fits."""
    parts = name.split(".")

    def common(tensor: StoredTensor) -> int:
        pairs = zip(reversed(parts), reversed(tensor.name.split(".")), strict=False)
        count = 0
        for ours, theirs in pairs:
            if ours != theirs:
                break
            count += 1
        return count

    best = max(tensors, key=common, default=None)
    return best if best is not None and common(best) >= min(2, len(parts)) else None


def explain(error: Exception, path: Path, tensors: Iterable[StoredTensor]) -> ModelError:
    """What mlx-lm or MLX said while loading, as one line with file, tensor and shapes.

    Args:
        error: as raised.
        path: the model's folder.
        tensors: what the headers tell.
    """
    text = str(error)
    if found := _SHAPES.search(text):
        wanted, given, name = found.groups()
        stored = file_of(name, tensors)
        where = path if stored is None else stored.file
        return ModelError(
            f"{where}: tensor {name} has shape {given}, the config asks for {wanted}",
            "do config.json and weights belong together?",
        )
    if found := _NAMES.search(text):
        kind, name = found.groups()
        missing = kind == "Missing"
        stored = None if missing else file_of(name, tensors)
        where = path if stored is None else stored.file
        says = "lacks tensor" if missing else "has a tensor that the config has no place for:"
        return ModelError(f"{where} {says} {name}", "do config.json and weights belong together?")
    reason = " ".join(text.split())[:300]
    return ModelError(
        f"the weights in {path} cannot be loaded: {reason}",
        "is the download complete, and do config and weights belong together?",
    )
