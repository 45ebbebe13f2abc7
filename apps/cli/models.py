"""`draftloom models`: known pairs, what of them is on this machine, and whether it would fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import typer

from .options import JsonOption

if TYPE_CHECKING:
    from draftloom.adapters.hub import Stored

__all__ = ["Row", "models", "rows"]


@attrs.frozen
class Row:
    """A pair.

    Attributes:
        target, drafter: as `--target` and `--drafter` take them.
        kind: the registered drafter.
        source: ``bundled``, or the file that lists the pair.
        stored: what is here of the target and of the drafter; None for nothing.
        note: for people.
    """

    target: str
    drafter: str
    kind: str
    source: str
    stored: tuple[Stored | None, Stored | None]
    note: str = ""

    @property
    def weights(self) -> int | None:
        """Bytes of both models' weights; None where one is not known."""
        sizes = [None if model is None else model.weights for model in self.stored]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def fits(self, memory: int | None) -> bool | None:
        """Whether the weights alone fit in `memory` bytes; None where that is not known."""
        if memory is None:
            return None
        known = sum(m.weights or 0 for m in self.stored if m is not None)
        if known > memory:
            return False
        return None if self.weights is None else True

    def as_data(self, memory: int | None) -> dict[str, Any]:
        """For ``--json``."""
        target, drafter = map(_state, self.stored)
        return {
            "target": self.target,
            "drafter": self.drafter,
            "kind": self.kind,
            "source": self.source,
            "note": self.note,
            "target_cached": target,
            "drafter_cached": drafter,
            "weight_bytes": self.weights,
            "fits": self.fits(memory),
        }


def models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List target/drafter pairs: what of them is cached here, and whether it fits in memory.

    Asks no hub. Sizes are those of files on this machine, so that they are known only of what is
    cached.
    """
    from draftloom.adapters.hub import Hub
    from draftloom.adapters.registry import user_file
    from draftloom.device import device_memory

    root = Hub().cache_root
    memory, found = device_memory(), list(rows(root))
    if as_json:
        report = {
            "memory_bytes": memory,
            "cache": str(root),
            "user_file": str(user_file()),
            "pairs": [row.as_data(memory) for row in found],
        }
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(_table(found, memory))
    typer.echo(f"\ncache {root}\nmemory {_size(memory)} (fits: weights alone, without caches)")
    typer.echo(f"your own pairs go in {user_file()}")


def rows(root: Path) -> Iterator[Row]:
    """All pairs: bundled, the user's, public, each with the quantizations that are cached.

    Raises:
        ModelError: the user's file cannot be read.
    """
    from draftloom.adapters.bundled import bundled_pairs
    from draftloom.adapters.hub import cached_names, stored
    from draftloom.adapters.locate import DRAFT_SUFFIX
    from draftloom.adapters.registry import PACKAGE_FILE, Registry

    for pair in bundled_pairs().values():
        here = (stored(pair.target), stored(pair.draft))
        name = pair.name + DRAFT_SUFFIX
        yield Row(pair.name, name, "dflash", "bundled", here, pair.description)
    registry, names = Registry.load(), cached_names(root)
    for known in registry.pairs:
        listed = dict.fromkeys(known.targets)
        listed |= {name: None for name in names if registry.find(name) is known}
        for target in listed:
            if registry.find(target, Path(target).expanduser()) is not known:
                continue  # the user's file says otherwise
            found = (_stored(target, root), _stored(known.drafter, root))
            source = "public" if known.source == PACKAGE_FILE else str(known.source)
            yield Row(target, known.drafter, known.kind, source, found, known.note)


def _stored(reference: str, root: Path) -> Stored | None:
    from draftloom.adapters.hub import Repository, cached, stored

    folder = Path(reference).expanduser()
    if folder.is_dir():
        return stored(folder)
    repository = Repository.parse(reference)
    return None if repository is None else cached(repository, root)


def _state(model: Stored | None) -> str:
    if model is None:
        return "no"
    return "yes" if model.whole else "partly"


def _table(found: list[Row], memory: int | None) -> str:
    verdict = {True: "yes", False: "no", None: "?"}
    lines = [("target", "cached", "drafter", "cached", "weights", "fits")]
    for row in found:
        target, drafter = map(_state, row.stored)
        fits = verdict[row.fits(memory)]
        lines.append((row.target, target, row.drafter, drafter, _size(row.weights), fits))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
