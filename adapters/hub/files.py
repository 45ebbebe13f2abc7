"""Which files of a repository are wanted, and which repositories are refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_lm.utils import _get_classes

from draftloom.errors import ModelError

from .repository import Repository

__all__ = [
    "INDEX",
    "SMALL",
    "WEIGHTS",
    "again",
    "check_config",
    "check_listing",
    "read_json",
    "weights_in",
    "weights_of",
]

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
SMALL = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.*",
    *TOKENIZERS[1:],
)
"""What `check` needs: config, tokenizer, index. Only at the top of a repository; never code."""
WEIGHTS = "model*.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
OTHER = ("*.gguf", "*.npz", "*.onnx", "*.h5", "*.msgpack", "*.safetensors")

_DRAFTER_KEYS = ("dflash_config", "speculators_model_type", "speculators_config")
_DRAFTER_WORDS = ("draft", "dflash", "dspark", "speculator", "eagle")


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Names at the top of a repository that match a pattern, sorted."""
    patterns = tuple(patterns)
    top = (name for name in names if "/" not in name)
    return sorted(name for name in top if any(fnmatchcase(name, p) for p in patterns))


def again(file: Path) -> str:
    """The hint for a spoilt file. In the hub's cache a name leads to a content that is fetched
    once: it is fetched anew only when that is gone."""
    if Repository.of_snapshot(file.parent) is None:
        return "download it again"
    return f"delete {file.resolve()} and run it again"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: it cannot be read, or is something else; names the file.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}", again(file)) from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object", again(file))
    return data


def check_listing(repository: str, names: Collection[str]) -> None:
    """Refuse a repository that is no model, or whose weights are not safetensors.

    Raises:
        ModelError: says what it holds instead.
    """
    if "config.json" not in names:
        found = matching(names, OTHER)
        other = f"; it holds {found[0]}" if found else ""
        raise ModelError(
            f"{repository} has no config.json{other}", "name a repository in mlx-lm's format"
        )
    if matching(names, [WEIGHTS]):
        return
    found = matching(names, (*PICKLED, *OTHER))
    only = f" (it holds {', '.join(found[:3])})" if found else ""
    why = "; unpickling can run code" if matching(names, PICKLED) else ""
    raise ModelError(
        f"{repository} has no weights as model*.safetensors{only}",
        f"only safetensors are loaded{why}: name a converted repository, or use mlx_lm.convert",
    )


def check_config(repository: str, config: Mapping[str, Any]) -> None:
    """Refuse a model that cannot be had without running the repository's own code.

    `auto_map` alone is no reason: many configs have one though mlx-lm brings the family itself.

    Raises:
        ModelError: names the key.
    """
    key = "model_file" if config.get("model_file") else "auto_map"
    if not config.get(key):
        return
    if key == "auto_map" and (_is_drafter(config) or _is_known(config)):
        return
    raise ModelError(
        f"{repository} needs code of its own ({key} in its config.json), which is never run",
        "name a model of a family that mlx-lm or an installed plugin brings",
    )


def weights_of(names: Collection[str], index: Mapping[str, Any] | None) -> list[str]:
    """The weight files that a model consists of: those its index names, else all.

    Raises:
        ModelError: the index names none, or a file outside the repository's top folder.
    """
    if index is None:
        return matching(names, [WEIGHTS])
    table = index.get("weight_map")
    shards = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if not shards:
        raise ModelError(f"{INDEX} names no weight file", "is the repository complete?")
    strange = [name for name in shards if not fnmatchcase(name, WEIGHTS) or "/" in name]
    if strange:
        raise ModelError(f"{INDEX} names {strange[0]!r}, which is no {WEIGHTS}")
    return shards


def weights_in(folder: Path) -> list[str] | None:
    """The weight files in a folder; None where they are not all there."""
    file = folder / INDEX
    index = read_json(file) if file.is_file() else None
    names = weights_of([path.name for path in folder.iterdir()], index)
    there = names and all((folder / name).is_file() for name in names)
    return names if there else None


def _is_drafter(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or ()
    words = " ".join([names] if isinstance(names, str) else map(str, names)).lower()
    return any(k in config for k in _DRAFTER_KEYS) or any(w in words for w in _DRAFTER_WORDS)


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm brings the model's family."""
    try:
        _get_classes(dict(config))
    except (ValueError, KeyError):
        return False
    return True
