"""What `draftloom train drafter` shows while it works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import error_console

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Screen"]


class Screen:
    """Progress on stderr: a bar on a terminal, a line a record elsewhere."""

    def __init__(self) -> None:
        self._tau = ""
        self._console = error_console()
        self._bar: Progress | None = None

    def __enter__(self) -> Screen:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        if self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Show a record of the log."""
        if record["kind"] == "features":
            self._console.print(f"features of {record['done']} of {record['total']} sequences")
            return
        if record["kind"] == "responses":
            self._responses(record)
            return
        if record["kind"] == "held-out":
            self._tau = f"held-out tau {record['tau']:.2f}"
            line = f"{self._tau} over {record['cycles']} cycles"
        elif record["kind"] == "first-step":
            line = f"first step done in {record['seconds']:.1f} s"
        else:
            line = (
                f"loss {record['loss']:.3f}  {record['tokens_per_second']:.0f} tokens/s  "
                f"{record['blocks_per_second']:.0f} blocks/s  "
                f"{_operations(record['operations_per_second'])}  "
                f"{_clock(record['seconds_left'])} left"
            )
        text = f"step {record['step']}  {line}"
        if self._bar is None:
            self._console.print(text, markup=False, soft_wrap=True)
            return
        shown = f"{text}  {self._tau}" if record["kind"] == "step" else text
        done = record.get("progress")
        self._bar.update(self._task, description=shown, completed=done)

    def _responses(self, record: dict[str, Any]) -> None:
        done, total = record["done"], record["total"]
        text = (
            f"target's responses {done}/{total}  {record['tokens_per_second']:.0f} tokens/s  "
            f"{_clock(record['seconds_left'])} left"
        )
        if self._bar is None:
            self._console.print(text, markup=False, soft_wrap=True)
            return
        share = 0.0 if done == total else done / total  # the bar begins anew for the training
        self._bar.update(self._task, description=text if share else "", completed=share)


def _operations(a_second: float) -> str:
    """Floating-point operations a second, for people."""
    if a_second < 1e11:
        return f"{a_second / 1e9:.3g} GFLOP/s"
    return f"{a_second / 1e12:.3g} TFLOP/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
