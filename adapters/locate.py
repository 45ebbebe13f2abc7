"""From a model reference to a local folder: bundled pairs, folders, hub repositories."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from draftloom.errors import ModelError

from .bundled import bundled_pairs, default_pair

__all__ = ["DRAFT_SUFFIX", "FILES", "locate"]

DRAFT_SUFFIX = "-draft"
"""The drafter of bundled pair NAME is called NAME-draft."""

FILES = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
)
"""What is fetched of a repository: weights as safetensors, configs, tokenizer. Never code."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def locate(reference: str) -> Path | None:
    """The local folder of a model.

    Args:
        reference: empty for the bundled target, the name of a bundled pair (its target) or that
            name with ``-draft`` (its drafter), a folder, or OWNER/NAME of a hub repository,
            which is downloaded where it is not cached.

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
    if _REPOSITORY.fullmatch(reference):
        return _download(reference)
    if "/" in reference or reference.startswith("."):
        raise ModelError(f"no model folder at {reference}", "check the path")
    return None


def _download(repository: str) -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILES)))
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated", "accept its terms on the hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no hub repository {repository} (or it is private), and no such folder",
            "check the name; for a private one, `hf auth login`",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{repository} is no folder here and cannot be downloaded: {first}",
            "check the network, or give a folder",
        ) from error
