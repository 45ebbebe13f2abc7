"""The options that say how much memory is taken: packed caches, the limit, the prompt's chunks."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "ContextLengthOption",
    "KvBitsOption",
    "KvGroupSizeOption",
    "MemoryLimitOption",
    "PrefillStepSizeOption",
    "QuantizedKvStartOption",
]

MEMORY = "Memory"

KvBitsOption = Annotated[
    int | None,
    typer.Option(
        metavar="BITS",
        help="Pack the target's key/value caches: 2, 3, 4, 5, 6 or 8 bits. Default: plain.",
        rich_help_panel=MEMORY,
    ),
]
KvGroupSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Numbers of a packed cache that share a scale: 32, 64 or 128. Default: 64.",
        rich_help_panel=MEMORY,
    ),
]
QuantizedKvStartOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Pack caches that hold at least N tokens. Default: 5000.",
        rich_help_panel=MEMORY,
    ),
]
MemoryLimitOption = Annotated[
    float | None,
    typer.Option(
        metavar="GB",
        help="Memory that may be taken, in 10^9 bytes. Default: what the device or host has.",
        rich_help_panel=MEMORY,
    ),
]
ContextLengthOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="See that caches of N tokens fit, before weights are loaded.",
        rich_help_panel=MEMORY,
    ),
]
PrefillStepSizeOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Prompt tokens run at once. Default: 2048.", rich_help_panel=MEMORY
    ),
]
