"""`--offline`: the one option that concerns the process, not the pipeline."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .options import PARTS

__all__ = ["OfflineOption"]


def _go_offline(value: bool) -> None:
    """Keep this process from the hub, and every library in it that asks the hub."""
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None:  # a plugin has imported it: it has read its environment
            constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


OfflineOption = Annotated[
    bool,
    typer.Option(
        "--offline",
        help="Use models that are cached, and ask no hub.",
        rich_help_panel=PARTS,
        callback=_go_offline,
        expose_value=False,
        is_eager=True,
    ),
]
