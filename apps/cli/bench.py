"""`draftloom bench`: the target alone, draftloom without drafts, and pipelines, measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.console import Console

from draftloom.errors import UsageError

from .bench_common import (
    at_least,
    check_writable,
    read_prompts,
    say_progress,
    write_text,
)
from .bench_stability import stability
from .bench_study import Study
from .options import (
    DtypeOption,
    KernelOption,
    PipelineFlags,
    TargetOption,
    parse_kernels,
    parse_width,
)
from .output import busy, fallback_on_stderr, say_note
from .state import state_of

if TYPE_CHECKING:
    from draftloom.apps.bench.measure import Settings
    from draftloom.apps.bench.prompts import EncodedPrompt
    from draftloom.apps.bench.subjects import Subject
    from draftloom.builder import PipelineBuilder
    from draftloom.plugins import PluginManager

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure the target alone and pipelines, in one run.", pretty_exceptions_enable=False
)

VARIANTS = "Variants"
PROMPTS = "Prompts"
SIMULATION = "Simulation"
OUTPUT = "Output"


@attrs.frozen(kw_only=True)
class _Chosen:
    """The options that choose variants, as given."""

    pipelines: Sequence[Path]
    drafters: Sequence[str]
    block_sizes: Sequence[int]
    widths: Sequence[str]
    kernel: list[str] | None

    def width_choices(self) -> list[tuple[str, str | int | None]]:
        """What to call each width, and what the builder takes; one None where none is given."""
        for size in self.block_sizes:
            if size < 1:
                raise UsageError(f"block size must be at least 1, got {size}", "1 drafts nothing")
        found: list[tuple[str, str | int | None]] = [
            (f"block {size}", size - 1) for size in self.block_sizes
        ]
        found += [(f"width {text}", parse_width(text)) for text in self.widths]
        return found or [("", None)]

    def builders(
        self, target: str | None, dtype: str | None, plugins: PluginManager
    ) -> list[tuple[str, PipelineBuilder]]:
        """Every variant's name and builder."""
        found = []
        for file in self.pipelines:
            flags = PipelineFlags(target=target, dtype=dtype, kernel=self.kernel, pipeline=file)
            found.append((file.stem, flags.builder(plugins).own_width()))
        drafters: list[str | None] = [*self.drafters]
        if not drafters and (self.block_sizes or self.widths or not self.pipelines):
            drafters = [None]
        for drafter in drafters:
            flags = PipelineFlags(target=target, dtype=dtype, drafter=drafter, kernel=self.kernel)
            base = flags.builder(plugins).own_width()
            for label, width in self.width_choices():
                name = " ".join(filter(None, [drafter and Path(drafter).name, label]))
                found.append((name or "default", base if width is None else base.width(width)))
        return found


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    target: TargetOption = None,
    dtype: DtypeOption = None,
    kernel: KernelOption = None,
    pipeline: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.toml", help="A variant. Repeatable.", rich_help_panel=VARIANTS),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|DIR|REPO",
            help="A variant with this drafter, at every width given. Repeatable.",
            rich_help_panel=VARIANTS,
        ),
    ] = None,
    block_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="A variant of this block size. Repeatable.", rich_help_panel=VARIANTS
        ),
    ] = None,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY|N",
            help="A variant of this width policy or number of draft tokens. Repeatable.",
            rich_help_panel=VARIANTS,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="code, math, chat or edit. Repeatable. Default: code.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="gsm8k, math500, humaneval, mbpp or mt-bench, told from the keys. Repeatable.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            metavar="N", help="Prompts of each suite and data set.", rich_help_panel=PROMPTS
        ),
    ] = 4,
    lengths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens to generate.", rich_help_panel=PROMPTS)
    ] = "256",
    stop_at_eos: Annotated[
        bool,
        typer.Option(
            "--stop-at-eos",
            help="End texts where the model does; else all have the full length.",
            rich_help_panel=PROMPTS,
        ),
    ] = False,
    repeats: Annotated[int, typer.Option(metavar="N", help="Times everything is run.")] = 3,
    warm_up: Annotated[
        int, typer.Option(metavar="N", help="Tokens generated before each variant's turn.")
    ] = 16,
    cool_down: Annotated[
        float, typer.Option(metavar="SECONDS", help="Rest before each variant's turn.")
    ] = 0.0,
    stages: Annotated[
        bool, typer.Option("--stages/--no-stages", help="A pass a text that times the stages.")
    ] = True,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Run the pipeline as it is, and once with each kernel switch the other way; say "
            "what each is worth.",
            rich_help_panel=VARIANTS,
        ),
    ] = False,
    ablate_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATION",
            help="The same for the switches of this operation. Repeatable.",
            rich_help_panel=VARIANTS,
        ),
    ] = None,
    simulate_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="P|P,P,...",
            help="Random weights; keep draft tokens with this probability, by position.",
            rich_help_panel=SIMULATION,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="qwen3.5-4b, qwen3.5-9b, qwen3.5-27b, qwen3.5-35b-a3b, qwen3-8b or tiny.",
            rich_help_panel=SIMULATION,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Length of the random prompts.", rich_help_panel=SIMULATION),
    ] = 128,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="All runs, as data.", rich_help_panel=OUTPUT),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="A page with plots.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Measure the target alone (mlx-lm), draftloom without drafts, and pipelines, in turns."""
    if context.invoked_subcommand is not None:
        return
    chosen = _Chosen(
        pipelines=pipeline or (),
        drafters=drafter or (),
        block_sizes=block_size or (),
        widths=width or (),
        kernel=kernel,
    )
    for file in (json_file, html_file):
        check_writable(file)
    at_least(1, limit=limit, repeats=repeats, warm_up=warm_up)
    if not 0 <= cool_down < float("inf"):
        raise UsageError(f"--cool-down must be at least 0 seconds, got {cool_down:g}")
    from draftloom.apps.bench.measure import Settings

    settings = Settings(
        lengths=_lengths(lengths),
        repeats=repeats,
        warm_up=warm_up,
        cool_down=cool_down,
        stop_at_eos=stop_at_eos,
    )
    study = Study(ablate, ablate_only or ())
    with fallback_on_stderr():
        if simulate_acceptance is None:
            if shape is not None:
                raise UsageError("--shape is for random weights", "add --simulate-acceptance P")
            builders = study.vary(chosen.builders(target, dtype, state_of(context).plugins))
            subject, prompts = _real(builders, _PromptChoice(suite or (), dataset or (), limit))
        else:
            _refuse_with_simulation(target, chosen, suite, dataset)
            at_least(2, prompt_tokens=prompt_tokens)
            if shape is None:
                raise UsageError("--simulate-acceptance needs a shape", "--shape qwen3.5-4b")
            options = (shape, _rates(simulate_acceptance), prompt_tokens)
            subject, prompts = _simulated(options, dtype, (chosen, study), limit)
        study.say_left_out()
        report = _measured(subject, settings, prompts, stages)
        study.complete(report)
        _show(report, (json_file, html_file))


@attrs.frozen
class _PromptChoice:
    suites: Sequence[str]
    datasets: Sequence[Path]
    limit: int


def _real(
    builders: Sequence[tuple[str, PipelineBuilder]], choice: _PromptChoice
) -> tuple[Subject, list[EncodedPrompt]]:
    from draftloom.apps.bench.measure import encode_prompts
    from draftloom.apps.bench.subjects import load_subject

    prompts = read_prompts(choice.suites, choice.datasets, choice.limit)
    with busy("loading the target"):
        subject = load_subject(builders)
        return subject, encode_prompts(subject, prompts)


def _simulated(
    options: tuple[str, tuple[float, ...], int],
    dtype: str | None,
    choice: tuple[_Chosen, Study],
    count: int,
) -> tuple[Subject, list[EncodedPrompt]]:
    from draftloom.apps.bench.simulate import random_prompts, simulated_subject
    from draftloom.apps.bench.subjects import Simulation

    (shape, rates, prompt_tokens), (chosen, study) = options, choice
    simulation = Simulation(shape, rates, prompt_tokens=prompt_tokens)
    widths = [(name or "dflash", width) for name, width in chosen.width_choices()]
    kernels = parse_kernels(chosen.kernel or [])
    with busy("making random weights"):
        subject = simulated_subject(simulation, dtype or "auto", widths, kernels, study.vary)
    return subject, random_prompts(simulation, subject.vocab_size, count)


def _refuse_with_simulation(
    target: str | None, chosen: _Chosen, suite: object, dataset: object
) -> None:
    given = {
        "--target": target, "--pipeline": chosen.pipelines, "--drafter": chosen.drafters,
        "--suite": suite, "--dataset": dataset,
    }  # fmt: skip
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} does not go with --simulate-acceptance",
                "weights and prompts are random there; choose a --shape",
            )


def _measured(
    subject: Subject, settings: Settings, prompts: list[EncodedPrompt], stages: bool
) -> dict[str, Any]:
    from draftloom.apps.bench.measure import check_room
    from draftloom.apps.bench.report import run_bench

    check_room(subject, settings, prompts)
    return run_bench(subject, settings, prompts, stages=stages, progress=say_progress)


def _show(report: dict[str, Any], files: tuple[Path | None, Path | None]) -> None:
    from draftloom.apps.bench.html import render_html
    from draftloom.apps.bench.table import print_report

    print_report(report, Console(highlight=False))
    json_file, html_file = files
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
    if html_file is not None:
        write_text(html_file, render_html(report))


def _lengths(text: str) -> tuple[int, ...]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--lengths cannot be read: {text!r}", "as in 1024,2048") from error
    if found[0] < 2:
        raise UsageError(f"--lengths must be at least 2 tokens, got {found[0]}")
    return tuple(found)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--simulate-acceptance cannot be read: {text!r}", "0.85, or 0.9,0.8,0.7"
        ) from error
    if not all(0 <= rate <= 1 for rate in rates):
        raise UsageError(f"--simulate-acceptance {text}: a probability is in [0, 1]")
    return rates


bench_app.command()(stability)


@bench_app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="What bench --json wrote.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The same, later.")],
) -> None:
    """Compare two reports: B's decoded tokens a second over A's, with the spread of both."""
    from draftloom.apps.bench.compare import compare_reports, differences
    from draftloom.apps.bench.report import read_report

    old, new = read_report(before), read_report(after)
    found = compare_reports(old, new)
    for line in differences(old, new):
        say_note(f"warning: not the same: {line}")
    tag = "simulated: " if new["simulated"] else ""
    rows: list[list[Any]] = [["variant", "tokens", "A", "B", "B/A", "range", ""]]
    for entry in found:
        suite = "" if entry.suite == "all" else f", {entry.suite}"
        rows.append(
            [
                entry.variant + suite,
                str(entry.length),
                f"{entry.before:.1f}",
                f"{entry.after:.1f}",
                f"{entry.ratio:.3f}",
                f"{entry.low:.3f}-{entry.high:.3f}",
                "" if entry.certain else "within the spread",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            cell.rjust(w) if 0 < i < 6 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        typer.echo(f"{tag}{'  '.join([first, *rest])}".rstrip())
