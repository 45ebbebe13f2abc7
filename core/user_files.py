"""Where a user's own files are, and how they are written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "user_folder", "write_whole"]


def user_folder() -> Path:
    """``draftloom`` in XDG_CONFIG_HOME or ~/.config; it need not be there."""
    return _below("XDG_CONFIG_HOME", "~/.config")


def cache_folder() -> Path:
    """``draftloom`` in XDG_CACHE_HOME or ~/.cache; it need not be there."""
    return _below("XDG_CACHE_HOME", "~/.cache")


def _below(variable: str, default: str) -> Path:
    base = os.environ.get(variable, "")
    root = Path(base) if os.path.isabs(base) else Path(default).expanduser()
    return root / "draftloom"


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folder; text as UTF-8.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
        try:
            part.write(content.encode() if isinstance(content, str) else content)
            part.flush()
            os.replace(part.name, file)
        except BaseException:
            os.unlink(part.name)
            raise
