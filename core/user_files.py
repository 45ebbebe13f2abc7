"""Where a user's own settings are."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_folder"]


def user_folder() -> Path:
    """``draftloom`` in XDG_CONFIG_HOME or ~/.config; it need not be there."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path("~/.config").expanduser()
    return root / "draftloom"
