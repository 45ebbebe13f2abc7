"""What people see: text as it comes, progress, summaries and errors.

Text goes to stdout, everything else to stderr. Where a stream is no terminal, text is plain and
there is no progress and no summary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from draftloom.errors import (
    CheckpointWarning,
    DrafterFallbackWarning,
    DrafterMismatchWarning,
    MemoryGuardWarning,
)

if TYPE_CHECKING:
    from draftloom.pipeline import GenerationResult

__all__ = [
    "PrefillBar",
    "TextPrinter",
    "busy",
    "error_console",
    "fallback_on_stderr",
    "say_error",
    "say_note",
    "summary",
]

_CONTROLS = (*range(9), *range(11, 32), 127)
_UNPRINTABLE = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")


def error_console() -> Console:
    """A console on stderr."""
    return Console(stderr=True, highlight=False)


def say_error(message: str, prefix: str = "draftloom: error: ") -> None:
    """One line on stderr; red on a terminal."""
    text = message if not prefix else " ".join(message.split())
    error_console().print(f"{prefix}{text}", style="red", markup=False, soft_wrap=True)


def say_note(message: str) -> None:
    """One line on stderr that is no error."""
    text = " ".join(message.split())
    error_console().print(f"draftloom: {text}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def fallback_on_stderr() -> Iterator[None]:
    """Say a drafter's failure, that it does not belong to the target, keys of its checkpoint that
    nobody read, or short memory, once, as one line instead of Python's way of showing warnings."""
    ours = (
        DrafterFallbackWarning,
        DrafterMismatchWarning,
        CheckpointWarning,
        MemoryGuardWarning,
    )
    said: set[str] = set()
    show = warnings.showwarning

    def show_once(message: Warning | str, category: type[Warning], *rest: object) -> None:
        if not issubclass(category, ours):
            show(message, category, *rest)  # type: ignore[arg-type]
        elif str(message) not in said:
            said.add(str(message))
            say_note(str(message))

    with warnings.catch_warnings():
        for kind in ours:
            warnings.simplefilter("always", kind)
        warnings.showwarning = show_once  # type: ignore[assignment]
        yield


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A moving line on stderr while something takes its time; nothing where it is no terminal."""
    console = error_console()
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


class PrefillBar:
    """A progress bar on stderr for the prompt; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        console = error_console()
        if console.is_terminal:
            columns = (TextColumn("prompt"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("prompt", total=None)
            self._progress.start()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` prompt tokens are in the caches."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Take the bar away. May be called again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class TextPrinter:
    """Writes text to stdout as it comes.

    On a terminal, control characters are shown as replacement characters: a model must not be
    able to move the cursor. In a pipe the text is left as it is.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Write and flush a piece of text."""
        if text:
            sys.stdout.write(text.translate(_UNPRINTABLE) if self._terminal else text)
            sys.stdout.flush()

    def end(self) -> None:
        """End the line, once the text has ended."""
        sys.stdout.write("\n")
        sys.stdout.flush()


def summary(result: GenerationResult) -> None:
    """One line on how it went, on stderr where that is a terminal."""
    console = error_console()
    if console.is_terminal:
        console.print(summary_line(result), style="dim", markup=False, soft_wrap=True)


def summary_line(result: GenerationResult) -> str:
    """Tokens, speed and acceptance in one line."""
    stats, names = result.stats, result.pipeline
    parts = [
        f"{stats.generated_tokens} tokens",
        f"{stats.decode_tokens_per_second:.1f} tokens/s",
        f"acceptance length {stats.acceptance_length:.2f} over {stats.cycles} cycles",
        f"drafter {names['drafter']}"
        + (" (gave up)" if stats.fell_back else " (mismatch)" if stats.mismatch else ""),
        f"prompt {stats.prompt_tokens} tokens in {stats.prefill_seconds:.2f} s",
        result.finish_reason,
    ]
    if stats.width:
        parts.insert(4, f"now {stats.width}")
    return " · ".join(parts)
