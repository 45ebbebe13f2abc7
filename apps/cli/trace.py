"""`--trace FILE.jsonl`: one record a cycle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

import attrs

from draftloom.errors import UsageError

if TYPE_CHECKING:
    from draftloom.pipeline import Chunk

__all__ = ["TraceFile"]


class TraceFile:
    """Writes what each cycle did as a line of JSON.

    A record holds the fields of `CycleEvent` and ``text``, what the cycle added to the text. The
    token that the prompt's own last position gives belongs to no cycle and has no record. The file
    is opened when the first token is there: a run that fails before leaves none.

    Args:
        path: the file; one that exists is replaced.

    Raises:
        UsageError: the file cannot be written; said before any model is loaded where possible.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        folder = path.parent
        if path.is_dir():
            raise UsageError(f"trace file {path} is a folder", "name a file")
        if not folder.is_dir():
            raise UsageError(f"trace file {path}: there is no folder {folder}", "make it first")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UsageError(f"trace file {path} is not writable", "check its permissions")

    def add(self, chunk: Chunk) -> None:
        """Record a cycle; the first chunk, which belongs to none, only opens the file.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            if self._file is None:
                self._file = self._path.open("w", encoding="utf-8")
            if chunk.cycle.index == 0 or not chunk.token_ids:
                return
            event = attrs.evolve(
                chunk.cycle,
                token_ids=chunk.token_ids,
                finish_reason=chunk.finish_reason,
                logprobs=chunk.logprobs,
            )
            self._file.write(json.dumps({**event.as_dict(), "text": chunk.text}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"trace file {self._path} cannot be written: {error.strerror or error}",
                "check path, permissions and space",
            ) from error

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._file is not None:
            self._file.close()
