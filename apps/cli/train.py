"""`draftloom train drafter`: a drafter for a target, trained where the target runs."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloom.errors import UsageError

from .options import DtypeOption, TargetOption
from .output import error_console, fallback_on_stderr, say_note
from .state import state_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["parse_bytes", "train_app"]

train_app = typer.Typer(help="Train a drafter for a target.", no_args_is_help=True)

DRAFTER, DATA, TRAINING, MEASURING = "Drafter", "Data", "Training", "Saving and measuring"


@train_app.callback()
def _train() -> None:
    """Train a drafter for a target."""


@train_app.command()
def drafter(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE|DIR",
            help="Text, or JSON lines with messages, prompt and response, text, or tokens; "
            "repeatable.",
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the drafter goes.", rich_help_panel=DATA)
    ],
    target: TargetOption = None,
    dtype: DtypeOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|REPO",
            help="Start from this drafter: for a fine-tuned target.",
            rich_help_panel=DRAFTER,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Default: 5.", rich_help_panel=DRAFTER),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            metavar="I,J,...",
            help="Target layers it reads. Default: 5, evenly spaced.",
            rich_help_panel=DRAFTER,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Anchor and draft slots. Default: 16.",
            rich_help_panel=DRAFTER,
        ),
    ] = None,
    mask_token: Annotated[
        int | None,
        typer.Option(
            metavar="ID",
            help="Stands in draft slots. Default: an id the tokenizer does not use.",
            rich_help_panel=DRAFTER,
        ),
    ] = None,
    sliding_window: Annotated[
        int | None,
        typer.Option(
            metavar="W",
            min=1,
            help="Context that all layers but the last see. Default: all of it.",
            rich_help_panel=DRAFTER,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(metavar="N", help="Optimizer updates.", rich_help_panel=TRAINING)
    ] = 1000,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Sequences at once.", rich_help_panel=TRAINING)
    ] = 8,
    accumulate: Annotated[
        int, typer.Option(metavar="N", help="Batches of an update.", rich_help_panel=TRAINING)
    ] = 1,
    context_length: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a sequence.", rich_help_panel=TRAINING)
    ] = 2048,
    anchors: Annotated[
        int, typer.Option(metavar="N", help="Blocks of a sequence.", rich_help_panel=TRAINING)
    ] = 128,
    learning_rate: Annotated[
        float, typer.Option(metavar="R", help="After warm-up.", rich_help_panel=TRAINING)
    ] = 6e-4,
    warmup: Annotated[
        float, typer.Option(metavar="S", help="Share of the steps.", rich_help_panel=TRAINING)
    ] = 0.04,
    loss: Annotated[
        str,
        typer.Option(metavar="NAME", help="cross-entropy or kl.", rich_help_panel=TRAINING),
    ] = "cross-entropy",
    weighting: Annotated[
        str, typer.Option(metavar="NAME", help="decay or d-pace.", rich_help_panel=TRAINING)
    ] = "decay",
    compute: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float32 or bfloat16, of the drafter's forward. Default: by device.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of everything.", rich_help_panel=TRAINING)
    ] = 0,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the target's features in files. Default: compute them as needed.",
            rich_help_panel=DATA,
        ),
    ] = None,
    features_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="At most, as 20GB.", rich_help_panel=DATA),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="S", help="Share of documents.", rich_help_panel=MEASURING)
    ] = 0.05,
    eval_every: Annotated[
        int, typer.Option(metavar="N", help="Steps; 0 is the end.", rich_help_panel=MEASURING)
    ] = 250,
    eval_prompts: Annotated[
        int, typer.Option(metavar="N", help="Held-out prompts.", rich_help_panel=MEASURING)
    ] = 8,
    eval_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of each.", rich_help_panel=MEASURING)
    ] = 64,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Steps; 0 is the end.", rich_help_panel=MEASURING)
    ] = 250,
    log_every: Annotated[
        int, typer.Option(metavar="N", help="Steps.", rich_help_panel=MEASURING)
    ] = 10,
) -> None:
    """Train a DFlash drafter. `draftloom generate --drafter OUT` takes it at once.

    Ctrl-C saves; the same command with --resume goes on.
    """
    tap_layers, budget = parse_taps(taps), parse_bytes(features_budget)
    from draftloom.apps.train.design import DrafterDesign
    from draftloom.apps.train.loop import TrainRequest
    from draftloom.apps.train.settings import TrainSettings

    settings = TrainSettings(
        steps=steps, batch=batch, accumulate=accumulate, context=context_length, anchors=anchors,
        learning_rate=learning_rate, warmup=warmup, loss=loss, weighting=weighting,
        compute=compute or _compute(), seed=seed, held_out=held_out, eval_every=eval_every,
        eval_prompts=eval_prompts, eval_tokens=eval_tokens, save_every=save_every,
        log_every=log_every,
    )  # fmt: skip
    settings.check(block_size or 2)
    design = DrafterDesign(
        layers=layers, taps=tap_layers, block_size=block_size, mask_token=mask_token,
        sliding_window=sliding_window,
    )  # fmt: skip
    plugins = state_of(context).plugins
    request = TrainRequest(
        target=target or "", data=tuple(data), out=out, settings=settings, design=design,
        init=None if init is None else plugins.locate_model(init), cache=features,
        cache_bytes=budget, dtype=dtype or "auto", resume=resume,
    )  # fmt: skip
    _run(request, plugins)


def _run(request: Any, plugins: Any) -> None:
    from draftloom.apps.train.loop import Trainer

    with fallback_on_stderr(), Screen(request.settings.steps) as screen:
        trainer = Trainer(request, plugins, screen.show)
        try:
            with _interruptions() as pressed:
                finished = trainer.run(lambda: bool(pressed))
        finally:
            trainer.close()
    if not finished:
        say_note(
            f"stopped after step {trainer.state.step} of {request.settings.steps}, saved in "
            f"{request.out}; the same command with --resume goes on"
        )
        raise typer.Exit(130)
    typer.echo(str(request.out))


def _compute() -> str:
    import mlx.core as mx

    return "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """The first Ctrl-C is noted, and the step is finished; the second one interrupts."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        say_note("finishing the step, then saving (Ctrl-C again stops at once)")

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: Python delivers no signals here
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Screen:
    """Progress on stderr: a bar on a terminal, a line a record elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps, self._tau = steps, ""
        self._console = error_console()
        self._bar: Progress | None = None

    def __enter__(self) -> Screen:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.description}"), console=self._console)
            self._task = self._bar.add_task("", total=self._steps)
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
        if record["kind"] == "held-out":
            self._tau = f"held-out tau {record['tau']:.2f}"
            line = f"{self._tau} over {record['cycles']} cycles"
        else:
            line = (
                f"loss {record['loss']:.3f}  {record['tokens_per_second']:.0f} tokens/s  "
                f"{_clock(record['seconds_left'])} left"
            )
        if self._bar is None:
            text = f"step {record['step']}/{self._steps}  {line}"
            self._console.print(text, markup=False, soft_wrap=True)
            return
        shown = line if record["kind"] == "held-out" else f"{line}  {self._tau}"
        self._bar.update(self._task, completed=record["step"], description=shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parse_taps(text: str | None) -> tuple[int, ...] | None:
    """Read ``I,J,...``.

    Raises:
        UsageError: not whole numbers with commas between.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--taps cannot be read: {text!r}", "write layers as 1,9,17") from error


def parse_bytes(text: str | None) -> int | None:
    """Read a size: ``20GB``, ``512MB``, ``1000``. Units are powers of 1000.

    Raises:
        UsageError: no such number.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"--features-budget cannot be read: {text!r}", "write a size as 20GB")
    power = "kmgt".find(found[2].lower()) + 1 if found[2] else 0
    return round(float(found[1]) * 1000**power)
