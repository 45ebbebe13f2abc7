"""From a model reference to a local folder: bundled pairs, folders, hub repositories."""

from __future__ import annotations

from pathlib import Path

from draftloom.errors import ModelError

from .bundled import bundled_pairs, default_pair
from .hub import Hub, Repository

__all__ = ["DRAFT_SUFFIX", "locate"]

DRAFT_SUFFIX = "-draft"
"""The drafter of bundled pair NAME is called NAME-draft."""


def locate(reference: str, hub: Hub | None = None) -> Path | None:
    """The local folder of a model.

    Args:
        reference: empty for the bundled target, the name of a bundled pair (its target) or that
            name with ``-draft`` (its drafter), a folder, or OWNER/NAME or OWNER/NAME@REVISION of a
            hub repository. Of a repository that is not cached the small files are downloaded;
            the weights follow when it is loaded.
        hub: how the hub is reached; by default as its environment says.

    Returns:
        The folder; None for a reference of another kind.

    Raises:
        ModelError: a folder that is not there, or a repository that cannot be had.
    """
    if not reference:
        return default_pair().target
    pairs = bundled_pairs()
    if reference in pairs:
        return pairs[reference].target
    if reference.removesuffix(DRAFT_SUFFIX) in pairs:
        return pairs[reference.removesuffix(DRAFT_SUFFIX)].draft
    path = Path(reference).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"{reference} is a file", "give the model's folder")
        return path.resolve()
    repository = Repository.parse(reference)
    if repository is not None:
        return (hub or Hub()).locate(repository)
    if "/" in reference or reference.startswith("."):
        raise ModelError(f"no model folder at {reference}", "check the path")
    return None
