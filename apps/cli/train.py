"""`draftloom train drafter`: a drafter for a target, trained where the target runs."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draftloom.errors import DraftloomError, UsageError

from .options import DtypeOption, TargetOption
from .output import fallback_on_stderr, say_note
from .state import state_of
from .train_screen import Screen

if TYPE_CHECKING:
    from draftloom.apps.train.group import Group
    from draftloom.apps.train.responses import ResponseSettings

__all__ = ["parse_bytes", "train_app"]

train_app = typer.Typer(help="Train a drafter for a target.", no_args_is_help=True)

DRAFTER, DATA, TRAINING, MEASURING = "Drafter", "Data", "Training", "Saving and measuring"
RESPONSES = "Responses of the target"


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
            help="Text, or JSON lines with messages, prompt and response, text, or token ids; "
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
    heads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Default: from the target.", rich_help_panel=DRAFTER),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Default: from the target.", rich_help_panel=DRAFTER),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Default: from the target.", rich_help_panel=DRAFTER),
    ] = None,
    intermediate_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Width of the MLP. Default: the target's.",
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
        int | None,
        typer.Option(
            metavar="N",
            help="Optimizer updates. Default: 1000, or as many as fit into --max-minutes.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="End after so long; the learning rate follows the clock.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help="Sequences at once, of each process.", rich_help_panel=TRAINING
        ),
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
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="adamw or muon.", rich_help_panel=TRAINING)
    ] = "adamw",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="After warm-up. Default: 6e-4, and 0.02 of muon.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
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
    gamma: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Of decay: weights exp(-(k-1)/G). Default: 7, 5, 4 for blocks of 16, 10, 8.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(metavar="R", help="Of the optimizer.", rich_help_panel=TRAINING)
    ] = 0.01,
    clip: Annotated[
        float,
        typer.Option(metavar="R", help="Norm of the gradient at most.", rich_help_panel=TRAINING),
    ] = 1.0,
    compute: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float32 or bfloat16, of the drafter's forward. Default: by device.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    compile_step: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Fuse the step: a slow first step, faster ones. Default: on a GPU.",
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
    regenerate: Annotated[
        bool,
        typer.Option(
            "--regenerate",
            help="Let the target answer the prompts first, and train on its words.",
            rich_help_panel=RESPONSES,
        ),
    ] = False,
    responses: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where its responses are kept. Default: training/responses in --out.",
            rich_help_panel=RESPONSES,
        ),
    ] = None,
    response_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="At most, of each. Default: 256.", rich_help_panel=RESPONSES
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Of a prompt cut out of plain text. Default: 64.",
            rich_help_panel=RESPONSES,
        ),
    ] = None,
    max_responses: Annotated[
        int | None,
        typer.Option(metavar="N", help="Default: one for every prompt.", rich_help_panel=RESPONSES),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Default: 0, greedy.", rich_help_panel=RESPONSES),
    ] = None,
    response_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Responses at once. Default: 32. On CUDA, 128 have been seen to crash with a "
            "hybrid target.",
            rich_help_panel=RESPONSES,
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(metavar="S", help="Share of documents.", rich_help_panel=MEASURING)
    ] = 0.05,
    eval_every: Annotated[
        int, typer.Option(metavar="N", help="Steps; 0 is the end.", rich_help_panel=MEASURING)
    ] = 250,
    eval_first: Annotated[
        bool,
        typer.Option(
            "--eval-first/--no-eval-first", help="Before training too.", rich_help_panel=MEASURING
        ),
    ] = True,
    eval_prompts: Annotated[
        int,
        typer.Option(
            metavar="N", help="Held-out prompts; 0 measures nothing.", rich_help_panel=MEASURING
        ),
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

    Ctrl-C saves; the same command with --resume goes on. Started by `mlx.launch -n N`, N processes
    train one drafter, a device each, with N times --batch.
    """
    tap_layers, budget = parse_taps(taps), parse_bytes(features_budget)
    from draftloom.apps.train.design import DrafterDesign
    from draftloom.apps.train.loop import TrainRequest
    from draftloom.apps.train.settings import TrainSettings

    settings = TrainSettings(
        steps=1000 if steps is None and max_minutes is None else steps, max_minutes=max_minutes,
        batch=batch, accumulate=accumulate, context=context_length, anchors=anchors,
        optimizer=optimizer, learning_rate=learning_rate, recompute=recompute,
        warmup=warmup, loss=loss, weighting=weighting, gamma=gamma,
        weight_decay=weight_decay, clip=clip,
        compile=_on_gpu() if compile_step is None else compile_step,
        compute=compute or ("bfloat16" if _on_gpu() else "float32"),
        seed=seed, held_out=held_out, eval_first=eval_first, eval_every=eval_every,
        eval_prompts=eval_prompts, eval_tokens=eval_tokens, save_every=save_every,
        log_every=log_every,
    )  # fmt: skip
    settings.check(block_size or 2)
    asked = {
        "tokens": response_tokens, "prompt_tokens": prompt_tokens, "limit": max_responses,
        "temperature": temperature, "batch": response_batch,
    }  # fmt: skip
    written = _responses(regenerate, responses, seed, asked)
    if features_budget is not None and features is None:
        raise UsageError("--features-budget is for --features", "give a folder for them too")
    design = DrafterDesign(
        layers=layers, taps=tap_layers, block_size=block_size, mask_token=mask_token,
        sliding_window=sliding_window, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=intermediate_size,
    )  # fmt: skip
    plugins = state_of(context).plugins
    request = TrainRequest(
        target=target or "", data=tuple(data), out=out, settings=settings, design=design,
        init=None if init is None else _checkpoint(plugins, init), cache=features,
        responses=written, responses_folder=responses, cache_bytes=budget,
        dtype=dtype or "auto", resume=resume,
    )  # fmt: skip
    _run(request, plugins)


def _responses(
    regenerate: bool, folder: Path | None, seed: int, asked: dict[str, Any]
) -> ResponseSettings | None:
    """How the target is to write; None where it is not to.

    Raises:
        UsageError: numbers that make no sense, or options of something that is not asked for.
    """
    from draftloom.apps.train.responses import ResponseSettings

    given = {name: value for name, value in asked.items() if value is not None}
    if regenerate:
        written = ResponseSettings(seed=seed, **given)
        written.check()
        return written
    if folder is not None or given:
        raise UsageError(
            "the target is to write nothing: --responses, --response-tokens, --prompt-tokens, "
            "--max-responses, --temperature and --response-batch go with --regenerate",
            "give --regenerate, or --data with what it wrote before",
        )
    return None


def _checkpoint(plugins: Any, reference: str) -> Path:
    """The folder of a drafter, with its weights."""
    folder: Path = plugins.locate_model(reference)
    plugins.fetch_weights(folder)
    return folder


def _run(request: Any, plugins: Any) -> None:
    from draftloom.apps.train.group import Group

    group = Group.join()
    try:
        _train_with(request, plugins, group)
    except DraftloomError as error:
        error.message = group.say(error.message)
        raise


def _train_with(request: Any, plugins: Any, group: Group) -> None:
    """Train, and say how it went: process 0 alone, where there are several."""
    from draftloom.apps.train.loop import Trainer

    with fallback_on_stderr(), Screen() if group.leads else nullcontext() as screen:
        show = (lambda record: None) if screen is None else screen.show
        try:
            trainer = Trainer(request, plugins, show, group)
        except KeyboardInterrupt:
            if group.leads:
                say_note(
                    "stopped; whole shards of features and responses are kept for the next time"
                )
            raise typer.Exit(130) from None
        try:
            with _interruptions(group.leads) as pressed:
                finished = trainer.run(lambda: bool(pressed))
        finally:
            trainer.close()
    if not finished:
        if group.leads:
            say_note(
                f"stopped after step {trainer.state.step}, saved in {request.out}; the same "
                "command with --resume goes on"
            )
        raise typer.Exit(130)
    if group.leads:
        typer.echo(str(request.out))


def _on_gpu() -> bool:
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.gpu)  # type: ignore[no-any-return]


@contextmanager
def _interruptions(speak: bool) -> Iterator[list[int]]:
    """The first Ctrl-C (or a request to terminate) is noted, and the step is finished; the second
    one interrupts."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        if speak:
            say_note("finishing the step, then saving (Ctrl-C again stops at once)")

    try:
        before = {n: signal.signal(n, press) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: Python delivers no signals here
        yield pressed
        return
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
