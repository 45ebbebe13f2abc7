"""`draftloom bench stability`: tau along a long text, in several compute types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .bench_common import (
    at_least,
    check_writable,
    read_prompts,
    say_progress,
    write_text,
)
from .options import (
    DrafterOption,
    KernelOption,
    PipelineFlags,
    PipelineOption,
    TargetOption,
)
from .output import fallback_on_stderr
from .state import state_of

__all__ = ["stability"]


def stability(
    context: typer.Context,
    target: TargetOption = None,
    drafter: DrafterOption = None,
    kernel: KernelOption = None,
    pipeline: PipelineOption = None,
    types: Annotated[
        str,
        typer.Option(metavar="TYPE,TYPE,...", help="Compute types, one after the other."),
    ] = "float32,bfloat16",
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of a text. Default: 8192, or as many as the context holds."
        ),
    ] = None,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens that are taken together.")] = 512,
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="code, math, chat or edit. Repeatable. Default: code."),
    ] = None,
    dataset: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.jsonl", help="As for bench. Repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Prompts of each.")] = 4,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="End texts where the model does.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="All runs, as data.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="A page with plots.")
    ] = None,
) -> None:
    """Does acceptance decay over a long text? tau by 512 tokens, bfloat16 against float32."""
    for file in (json_file, html_file):
        check_writable(file)
    at_least(1, limit=limit)
    at_least(8, window=window)
    at_least(2, length=2 if length is None else length)
    from draftloom.apps.bench.measure import Settings
    from draftloom.apps.bench.stability import (
        render_stability,
        run_stability,
        stability_table,
        types_of,
    )
    from draftloom.apps.bench.table import print_head, print_table

    settings = Settings(
        lengths=() if length is None else (length,),
        repeats=1,
        stop_at_eos=stop_at_eos,
        window=window,
    )
    flags = PipelineFlags(target=target, drafter=drafter, kernel=kernel, pipeline=pipeline)
    builder = flags.builder(state_of(context).plugins).own_width()
    with fallback_on_stderr():
        prompts = read_prompts(suite or (), dataset or (), limit)
        report = run_stability(builder, types_of(types), prompts, settings, say_progress)
    console = Console(highlight=False)
    print_head(report, console)
    print_table(*stability_table(report), console)
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
    if html_file is not None:
        write_text(html_file, render_stability(report))
