"""What the hub's cache holds, read from its folders without the hub."""

from __future__ import annotations

from pathlib import Path

import attrs

from draftloom.errors import ModelError

from .files import INDEX, read_json, weights_in
from .repository import Repository

__all__ = ["Stored", "cached", "cached_names", "stored"]


@attrs.frozen
class Stored:
    """A model on this machine.

    Attributes:
        folder: where it is.
        whole: whether config and all weights are there.
        weights: bytes that the weights take, from the files, or from the index where they are not
            all there; None where neither says.
    """

    folder: Path
    whole: bool
    weights: int | None


def stored(folder: Path) -> Stored:
    """What a model folder holds."""
    try:
        names = weights_in(folder)
    except ModelError:  # an index that cannot be read: loading the model says so
        names = None
    if names is not None and (folder / "config.json").is_file():
        return Stored(folder, True, sum((folder / name).stat().st_size for name in names))
    try:
        total = read_json(folder / INDEX)["metadata"]["total_size"]
    except (ModelError, KeyError, TypeError):
        total = None
    return Stored(folder, False, total if isinstance(total, int) else None)


def cached(repository: Repository, root: Path) -> Stored | None:
    """What the cache at `root` holds of a repository at its revision; None for nothing."""
    folder = root / repository.cache_folder
    revision = repository.revision or "main"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return stored(snapshot) if snapshot.is_dir() else None


def cached_names(root: Path) -> list[str]:
    """OWNER/NAME of all models in the cache at `root`, sorted."""
    folders = root.glob("models--*--*") if root.is_dir() else ()
    names = (folder.name.removeprefix("models--") for folder in folders if folder.is_dir())
    return sorted(name.replace("--", "/", 1) for name in names)
