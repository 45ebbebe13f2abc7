"""Fetching repositories into the hub's own cache, in two steps.

Config, tokenizer and index come when a model is located: enough to check a pipeline. Weights come
when it is loaded. Files appear in the cache under
their names only once they are whole, so that an interrupted download is never taken for a model.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import attrs
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import tqdm

from draftloom.errors import ModelError

from .failures import FAILURES, explain, is_unreachable
from .files import (
    INDEX,
    SMALL,
    check_config,
    check_listing,
    matching,
    read_json,
    weights_in,
    weights_of,
)
from .repository import Repository

__all__ = ["Hub"]

_LOG = logging.getLogger("draftloom.hub")


@attrs.frozen
class RemoteFile:
    """A file of a repository.

    Attributes:
        size: bytes; 0 where the hub does not say.
        blob: what the cache calls its content.
    """

    size: int
    blob: str


class _NoBar(tqdm):  # type: ignore[misc]
    """No progress for files that take no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


@attrs.frozen
class Hub:
    """Access to the hub through its cache.

    Attributes:
        offline: use what is cached and nothing else. The environment's HF_HUB_OFFLINE does the
            same for the whole process.
        cache: the cache folder; None is the hub's own choice (HF_HOME, HF_HUB_CACHE).
        endpoint: address of the hub; None is the hub client's own choice (HF_ENDPOINT).
    """

    offline: bool = False
    cache: Path | None = None
    endpoint: str | None = None

    @property
    def cache_root(self) -> Path:
        """The cache folder; it may not exist yet."""
        return Path(constants.HF_HUB_CACHE) if self.cache is None else self.cache

    def locate(self, repository: Repository) -> Path:
        """The folder of a repository with its small files; `complete` brings the weights.

        Where the hub gives no answer and the cache has the repository, that serves, and a warning
        is logged.

        Raises:
            ModelError: it cannot be had, or is refused (no safetensors, code of its own).
        """
        folder = self._cached(repository) if self.offline else self._small_files(repository)
        config = read_json(folder / "config.json")
        check_config(repository.name, config)
        return folder

    def complete(self, folder: Path) -> None:
        """Fetch the weights that a folder of the hub's cache lacks; any other folder is left be.

        Raises:
            ModelError: they cannot be had, or do not fit on the disk.
        """
        repository = Repository.of_snapshot(folder)
        if repository is None or weights_in(folder) is not None:
            return
        if self.offline:
            raise self._missing_weights(repository, explain(repository, OfflineModeIsEnabled()))
        root = folder.parents[2]
        index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
        try:
            files = self._listing(repository)
            names = weights_of(files, index)
            self._check_names(repository, names, files)
            _check_disk(repository, {n: files[n] for n in names}, root)
            self._download(repository, names, root)
        except FAILURES as error:
            raise self._missing_weights(repository, explain(repository, error)) from error
        if weights_in(folder) is None:
            raise ModelError(f"the download of {repository} left gaps", "run it again")

    # --- steps -------------------------------------------------------------------------------

    def _small_files(self, repository: Repository) -> Path:
        try:
            files = self._listing(repository)
            check_listing(repository.name, files)
            names = matching(files, SMALL)
            _check_disk(repository, {n: files[n] for n in names}, self.cache_root)
            return self._download(repository, SMALL, self.cache_root, bars=False)
        except FAILURES as error:
            if not is_unreachable(error):
                raise explain(repository, error) from error
            try:
                folder = self._cached(repository)
            except ModelError:
                raise explain(repository, error) from error
            if not isinstance(error, OfflineModeIsEnabled):  # that was asked for
                reason = explain(repository, error).message
                _warn_once(f"draftloom: using the cached copy of {repository}: {reason}")
            return folder

    def _cached(self, repository: Repository) -> Path:
        """The folder of a repository whose small files are all cached."""
        try:
            with _quiet():
                found = snapshot_download(
                    repository.name,
                    revision=repository.revision or None,
                    cache_dir=self.cache_root,
                    local_files_only=True,
                    allow_patterns=list(SMALL),
                    ignore_patterns=["*/*"],
                )
        except FAILURES as error:
            raise explain(repository, error) from error
        if not (Path(found) / "config.json").is_file():
            raise explain(repository, OfflineModeIsEnabled())
        return Path(found)

    def _listing(self, repository: Repository) -> dict[str, RemoteFile]:
        """The files of a repository, as the hub says now."""
        with _quiet():
            info = HfApi(endpoint=self.endpoint).model_info(
                repository.name, revision=repository.revision or None, files_metadata=True
            )
        return {
            file.rfilename: RemoteFile(
                file.size or 0, file.lfs.sha256 if file.lfs is not None else file.blob_id or ""
            )
            for file in info.siblings or ()
        }

    def _download(
        self, repository: Repository, patterns: Collection[str], root: Path, *, bars: bool = True
    ) -> Path:
        with _quiet():
            found = snapshot_download(
                repository.name,
                revision=repository.revision or None,
                cache_dir=root,
                endpoint=self.endpoint,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                tqdm_class=None if bars and sys.stderr.isatty() else _NoBar,
            )
        return Path(found)

    def _check_names(
        self, repository: Repository, names: Collection[str], files: Mapping[str, RemoteFile]
    ) -> None:
        missing = [name for name in names if name not in files]
        if missing:
            raise ModelError(
                f"{repository} lacks {missing[0]}, which its {INDEX} names",
                "the repository is incomplete: try another revision",
            )
        if not names:
            check_listing(repository.name, files)

    def _missing_weights(self, repository: Repository, why: ModelError) -> ModelError:
        """The error as explained; where another commit is cached whole, that is the hint."""
        others = self._whole_snapshots(repository)
        hint = f"whole in the cache: {repository.name}@{others[0]}" if others else why.hint
        return ModelError(f"the weights are missing: {why.message}", hint)

    def _whole_snapshots(self, repository: Repository) -> list[str]:
        folder = self.cache_root / repository.cache_folder / "snapshots"
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in found if weights_in(path) is not None)


@cache
def _warn_once(message: str) -> None:
    """A pipeline locates its models several times over."""
    _LOG.warning(message)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors are raised and explained here; the client's own log lines would only double them."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _check_disk(repository: Repository, files: Mapping[str, RemoteFile], root: Path) -> None:
    """Refuse a download that would fill the disk, before its first byte."""
    blobs = root / repository.cache_folder / "blobs"
    needed = sum(f.size for f in files.values() if not (f.blob and (blobs / f.blob).exists()))
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ModelError(
            f"{repository} needs {_size(needed)} on the disk of {there}, {_size(free)} are free",
            "free some space, or set HF_HOME to a folder on another disk",
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
