"""A module in place of one of a model's, for as long as it is needed."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

__all__ = ["StandIn"]


class StandIn(nn.Module):
    """Stands in for a module; attributes it does not have itself come from there.

    Attributes:
        held: the name that the module is kept under.

    Args:
        layer: the module.
        own: of the stand-in, each kept under its name with ``_`` before it. None is taken for a
            parameter or a module.
    """

    held = "layer"

    def __init__(self, layer: nn.Module, **own: Any) -> None:
        super().__init__()
        self[self.held] = layer
        for name, value in own.items():
            # Not through nn.Module's own setattr, which would look for parameters in it.
            object.__setattr__(self, "_" + name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if self.held not in self:  # before the constructor has run
                raise
            return getattr(self[self.held], name)
