"""What the commands that measure share: checked options, prompts, files that are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from draftloom.errors import UsageError

if TYPE_CHECKING:
    from draftloom.apps.bench.prompts import BenchPrompt

__all__ = ["at_least", "check_writable", "read_prompts", "say_progress", "write_text"]


def read_prompts(suites: Sequence[str], datasets: Sequence[Path], limit: int) -> list[BenchPrompt]:
    """The prompts of suites and data sets, at most `limit` of each; of the suite ``code`` where
    neither is given.

    Raises:
        UsageError: a suite or a file that cannot be had.
    """
    from draftloom.apps.bench.prompts import load_dataset, load_suite

    names = suites or (() if datasets else ("code",))
    prompts = [prompt for name in names for prompt in load_suite(name, limit)]
    for file in datasets:
        prompts += load_dataset(file, limit)
    return prompts


def say_progress(what: str) -> None:
    """What runs next, on a terminal."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        console.print(what, style="dim", markup=False)


def at_least(least: int, **values: int) -> None:
    """Refuse options below a number.

    Raises:
        UsageError: one is; names it.
    """
    for name, value in values.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_writable(file: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        UsageError: it is a folder, or its folder is not there.
    """
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"{file} cannot be written", "give a file in a folder that exists")


def write_text(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        UsageError: the disk refuses.
    """
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}") from error
