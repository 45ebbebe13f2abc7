"""Names of hub repositories: OWNER/NAME, OWNER/NAME@REVISION, and folders of the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

import attrs

__all__ = ["Repository"]

_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@attrs.frozen
class Repository:
    """A repository at a revision.

    Attributes:
        name: OWNER/NAME.
        revision: branch, tag or commit; empty is the repository's main branch.
    """

    name: str
    revision: str = ""

    @classmethod
    def parse(cls, reference: str) -> Repository | None:
        """Read ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; None for anything else."""
        found = _REFERENCE.fullmatch(reference)
        return None if found is None else cls(found["name"], found["revision"] or "")

    @classmethod
    def of_snapshot(cls, folder: Path) -> Repository | None:
        """The repository and commit that a folder of the hub's cache holds; None elsewhere.

        Source: the cache's layout, ``models--OWNER--NAME/snapshots/COMMIT``.
        """
        parts = folder.parts[-3:]
        if len(parts) < 3 or parts[1] != "snapshots" or not _COMMIT.fullmatch(parts[2]):
            return None
        kind, _, name = parts[0].partition("--")
        name = name.replace("--", "/", 1)
        return cls(name, parts[2]) if kind == "models" and "/" in name else None

    @property
    def cache_folder(self) -> str:
        """What the repository's folder is called in the hub's cache."""
        return "models--" + self.name.replace("/", "--")

    def __str__(self) -> str:
        """As a user would type it; a commit is cut to eight digits."""
        shown = self.revision[:8] if _COMMIT.fullmatch(self.revision) else self.revision
        return f"{self.name}@{shown}" if shown else self.name
