"""The built-in plugins by module name: the only place where core names its siblings.

They are imported when a plugin manager is made, not when draftloom is.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["BUILTIN_PLUGINS", "import_builtin"]

BUILTIN_PLUGINS = (
    "draftloom.adapters.plugin",
    "draftloom.caches.plugin",
    "draftloom.drafters.plugin",
    "draftloom.kernels.plugin",
    "draftloom.verifiers.plugin",
)


def import_builtin(module: str) -> ModuleType:
    """Import one of `BUILTIN_PLUGINS`. An import error is a defect and is not caught."""
    return importlib.import_module(module)
