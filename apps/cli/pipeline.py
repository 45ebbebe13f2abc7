"""`draftloom pipeline show|check`: a pipeline as it would be built. No weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftloom.errors import UsageError

from .options import PipelineFlags
from .state import state_of

__all__ = ["pipeline_app"]

pipeline_app = typer.Typer(
    help="Look at a pipeline file, or find what is wrong with it. Loads no weights.",
    no_args_is_help=True,
)
FileArgument = Annotated[Path, typer.Argument(metavar="FILE.toml", help="The pipeline file.")]


@pipeline_app.command()
def show(
    context: typer.Context,
    file: FileArgument,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart.")] = False,
    toml: Annotated[
        bool, typer.Option("--toml", help="As a pipeline file, every default filled in.")
    ] = False,
) -> None:
    """Print a pipeline with every default filled in."""
    if mermaid and toml:
        raise UsageError("both --mermaid and --toml are given", "give one of them")
    plan = PipelineFlags(pipeline=file).builder(state_of(context).plugins).check()
    if mermaid:
        typer.echo(plan.graph.mermaid())
    elif toml:
        typer.echo(plan.spec.to_toml(), nl=False)
    else:
        typer.echo(plan.graph.describe())


@pipeline_app.command()
def check(context: typer.Context, file: FileArgument) -> None:
    """Say what is wrong with a pipeline, all of it at once (exit code 2), or that it is sound."""
    plan = PipelineFlags(pipeline=file).builder(state_of(context).plugins).check()
    parts = ", ".join(f"{part} {name}" for part, name in plan.names.items() if part != "target")
    typer.echo(f"{file}: sound, for {plan.names['target']} ({parts})")
