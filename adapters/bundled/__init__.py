"""The pairs that ship inside the package, found without network and without mlx.

A folder here that holds a `pair.toml` is a bundled pair: `target/` in mlx-lm format,
`draft/` in z-lab DFlash format, a model card. `convert.py` makes one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from attrs import frozen

from draftloom.errors import ModelError

__all__ = ["DEFAULT_PAIR", "BundledPair", "bundled_pairs", "default_pair"]

DEFAULT_PAIR = "python-17m"
_REQUIRED = (
    "target/config.json",
    "target/model.safetensors",
    "target/tokenizer.json",
    "draft/config.json",
    "draft/model.safetensors",
)


@frozen
class BundledPair:
    """A target and its drafter, as folders.

    Attributes:
        name: The folder's name, such as `python-17m`.
        target: Folder that `mlx_lm.load` opens.
        draft: Folder of a DFlash drafter for it.
        description: One line for listings.
    """

    name: str
    target: Path
    draft: Path
    description: str


def bundled_pairs() -> dict[str, BundledPair]:
    """All bundled pairs by name, sorted; reads the descriptions only.

    Raises:
        ModelError: A pair lacks a file; names pair and file.
    """
    manifests = sorted(Path(__file__).resolve().parent.glob("*/pair.toml"))
    return {manifest.parent.name: _read_pair(manifest) for manifest in manifests}


def default_pair() -> BundledPair:
    """The pair used where no target is named.

    Raises:
        ModelError: The package was installed without its data files.
    """
    pairs = bundled_pairs()
    if DEFAULT_PAIR not in pairs:
        raise ModelError(
            f"the bundled pair {DEFAULT_PAIR!r} is not installed; found: {sorted(pairs)}",
            "install draftloom again with its data files, or name a target",
        )
    return pairs[DEFAULT_PAIR]


def _read_pair(manifest: Path) -> BundledPair:
    """One pair from its `pair.toml`, after a look at whether its files are there."""
    folder = manifest.parent
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"bundled pair {folder.name!r} lacks {', '.join(missing)}", "install draftloom again"
        )
    return BundledPair(
        name=folder.name,
        target=folder / "target",
        draft=folder / "draft",
        description=tomllib.loads(manifest.read_text("utf-8"))["description"],
    )
