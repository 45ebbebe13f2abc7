"""`draftloom eval drafter`: a drafter judged by the decoder that users run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.console import Console

from draftloom.errors import UsageError

from .bench_common import at_least, check_writable, say_progress, write_text
from .options import DrafterOption, DtypeOption, KernelOption, PipelineFlags, TargetOption
from .output import busy, fallback_on_stderr, say_note
from .state import state_of

if TYPE_CHECKING:
    from draftloom.apps.bench.measure import Settings
    from draftloom.apps.bench.prompts import EncodedPrompt
    from draftloom.apps.bench.subjects import Subject
    from draftloom.builder import PipelineBuilder
    from draftloom.plugins import PluginManager

__all__ = ["eval_app"]

eval_app = typer.Typer(help="Judge a drafter.", no_args_is_help=True)

PROMPTS, OUTPUT = "Prompts", "Output"
LOOKUP = "prompt-lookup"


@eval_app.callback()
def _eval() -> None:
    """Judge a drafter."""


@eval_app.command()
def drafter(
    context: typer.Context,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    dtype: DtypeOption = None,
    kernel: KernelOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|DIR|REPO", help="An older drafter to compare with. Repeatable."),
    ] = None,
    drafter_bits: Annotated[
        list[int] | None,
        typer.Option(
            metavar="4|8",
            help="Compare with the same drafter, its weights packed to so many bits. Repeatable.",
        ),
    ] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup/--no-lookup", help="Compare with prompt lookup.")
    ] = True,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Held-out text, in the forms that training reads. Repeatable.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="code, math, chat or edit. Repeatable. Default: all, unless there is --data.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", help="Prompts of each.", rich_help_panel=PROMPTS)
    ] = 8,
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Of a text at most.", rich_help_panel=PROMPTS)
    ] = 256,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Of a prompt of --data at most: its last ones.",
            rich_help_panel=PROMPTS,
        ),
    ] = 1024,
    repeats: Annotated[int, typer.Option(metavar="N", help="Times everything is run.")] = 1,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Everything, as data.", rich_help_panel=OUTPUT),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="A page with plots.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Acceptance length, acceptance by position and by content type, and speed: measured here,
    against the target alone, prompt lookup and an older drafter."""
    for file in (json_file, html_file):
        check_writable(file)
    at_least(1, limit=limit, repeats=repeats, prompt_tokens=prompt_tokens)
    at_least(2, tokens=tokens)
    from draftloom.apps.bench.measure import Settings
    from draftloom.apps.bench.prompts import built_in_suites

    choice = _Prompts(
        tuple(suite or (() if data else built_in_suites())), tuple(data or ()), limit, prompt_tokens
    )
    settings = Settings(lengths=(tokens,), repeats=repeats, stop_at_eos=True)
    base = PipelineFlags(target=target, dtype=dtype, drafter=drafter, kernel=kernel)
    plugins = state_of(context).plugins
    with fallback_on_stderr():
        others = _Others(tuple(against or ()), tuple(drafter_bits or ()), lookup)
        report = _judged(base, others, (choice, settings), plugins)
        from draftloom.apps.evaluate.output import judgement_html, print_judgement

        print_judgement(report, Console(highlight=False))
        for warning in report["warnings"]:
            say_note(f"warning: {warning}")
        if json_file is not None:
            write_text(json_file, json.dumps(report, indent=1) + "\n")
        if html_file is not None:
            write_text(html_file, judgement_html(report))


@attrs.frozen
class _Others:
    """What the drafter is compared with: other drafters, itself packed to fewer bits, prompt
    lookup."""

    against: tuple[str, ...]
    bits: tuple[int, ...]
    lookup: bool


@attrs.frozen
class _Prompts:
    """What is asked: suites, data, how many of each, and the longest prompt of data."""

    suites: tuple[str, ...]
    data: tuple[Path, ...]
    limit: int
    longest: int


def _judged(
    base: PipelineFlags,
    others: _Others,
    work: tuple[_Prompts, Settings],
    plugins: PluginManager,
) -> dict[str, Any]:
    from draftloom.apps.bench.measure import check_room
    from draftloom.apps.bench.report import run_bench
    from draftloom.apps.bench.subjects import load_subject
    from draftloom.apps.evaluate.judge import judge, warnings_of

    choice, settings = work
    named = _named(base, others, plugins)
    judged = named[0][0]
    plan = named[0][1].check()
    if plan.names["drafter"] in ("none", ""):
        raise UsageError("the target has no drafter of its own", "name one with --drafter")
    with busy("loading the target"):
        subject = load_subject(named)
        prompts = _encoded(subject, choice, settings)
    check_room(subject, settings, prompts)
    report = run_bench(subject, settings, prompts, stages=False, progress=say_progress)
    report["judged"] = judged
    report["drafters"] = judge(report)
    found = LOOKUP if others.lookup else None
    report["warnings"] = warnings_of(
        report["drafters"], judged, found, plan.drafter.info.stated_length
    )
    return report


def _named(
    base: PipelineFlags, others: _Others, plugins: PluginManager
) -> list[tuple[str, PipelineBuilder]]:
    """The drafter that is judged, then what it is compared with."""

    def name_of(given: str) -> str:
        path = Path(given)
        return path.resolve().name if path.is_dir() else given.rsplit("/", 1)[-1]

    named = [(name_of(base.drafter or "drafter"), base.builder(plugins).own_width())]
    taken = {named[0][0]}
    for bits in dict.fromkeys(others.bits):
        packed = attrs.evolve(base, drafter_bits=bits)
        named.append((f"{named[0][0]}, {bits} bit", packed.builder(plugins).own_width()))
    for given in (*others.against, *([LOOKUP] if others.lookup else [])):
        name = name_of(given)
        while name in taken:
            name += " (against)"
        taken.add(name)
        named.append((name, attrs.evolve(base, drafter=given).builder(plugins).own_width()))
    return named


def _encoded(subject: Subject, choice: _Prompts, settings: Settings) -> list[EncodedPrompt]:
    from draftloom.apps.bench.measure import encode_prompts
    from draftloom.apps.bench.prompts import load_suite
    from draftloom.apps.evaluate.prompts import data_prompts

    prompts = [p for name in choice.suites for p in load_suite(name, choice.limit)]
    longest = choice.longest
    if subject.context_limit is not None:
        longest = max(1, min(longest, subject.context_limit - settings.lengths[0]))
    encoded = encode_prompts(subject, prompts) if prompts else []
    return encoded + data_prompts(
        choice.data, subject.tokenizer, subject.vocab_size, limit=choice.limit, longest=longest
    )
