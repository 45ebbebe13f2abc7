"""The application: its commands, what plugins add to it, and what an error turns into.

Exit codes: 0; 1 for a generation that failed, or a bug that `audit` found; 2, with one line on
stderr, for a user's mistake; 130 after a second Ctrl-C.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from draftloom.errors import DraftloomError, GenerationError, GraphError, PluginError

from .audit import audit
from .bench import bench_app
from .chat import chat
from .doctor import doctor
from .evaluate import eval_app
from .generate import generate
from .inspect import inspect
from .models import models
from .output import say_error
from .pipeline import pipeline_app
from .plugins import plugins
from .state import CliState
from .train import train_app

__all__ = ["build_app", "main", "run"]

NAME = "draftloom"
LAUNCHES_AT_ONCE, MOST_LAUNCHES = "MLX_MAX_OPS_PER_BUFFER", "120"
"""How many launches MLX hands over together at most, which it asks the environment alone. Its own
few dozen cost a small model more than they gain; a large one's are cut by their bytes before."""


def build_app(state: CliState) -> typer.Typer:
    """The Typer application with all commands, those of plugins included.

    Raises:
        PluginError: a plugin cannot be loaded, or its commands cannot be added.
    """
    app = typer.Typer(
        name=NAME,
        help="Lossless speculative decoding on MLX, of parts that can be exchanged.",
        epilog="Without --target the bundled pair is used: draftloom generate 'def add('",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "obj": state},
    )
    app.callback(invoke_without_command=True)(_root)
    app.command()(generate)
    app.command()(chat)
    app.command()(audit)
    app.add_typer(bench_app, name="bench")
    app.add_typer(pipeline_app, name="pipeline")
    app.add_typer(train_app, name="train")
    app.add_typer(eval_app, name="eval")
    app.command()(inspect)
    app.command()(models)
    app.command()(plugins)
    app.command()(doctor)
    if state.may_have_commands:
        _add_plugin_commands(app, state)
    return app


def _add_plugin_commands(app: typer.Typer, state: CliState) -> None:
    """Call every plugin's hook by itself, so that a failing one can be named."""
    for implementation in state.plugins.hook.register_commands.get_hookimpls():
        try:
            implementation.function(
                **{name: app for name in implementation.argnames if name == "cli"}
            )
        except Exception as error:
            raise PluginError(
                f"plugin {implementation.plugin_name!r} cannot add its commands: "
                f"{type(error).__name__}: {error}",
                "repair or uninstall it",
            ) from error


def _show_version(value: bool) -> None:
    if value:
        from draftloom import __version__

        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str] | None = None, state: CliState | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; by default those of the process.
        state: the plugins to use; by default all installed ones.

    Returns:
        The exit code.
    """
    try:
        command = typer.main.get_command(build_app(state or CliState()))
        given = None if arguments is None else list(arguments)
        result = command.main(args=given, prog_name=NAME, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GraphError as error:
        _say_problems(error)
        return 2
    except GenerationError as error:
        say_error(str(error))
        return 1
    except DraftloomError as error:
        say_error(str(error))
        return 2
    except typer.Abort:
        return 130
    except Exception as error:
        # Typer brings its own copy of click's exceptions or uses click's, by version: what they
        # share is `format_message`. Anything else is a defect of ours and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        say_error(_usage_line(error))
        return 2


def _say_problems(error: GraphError) -> None:
    if len(error.problems) == 1:
        say_error(str(error.problems[0]))
        return
    say_error(f"the pipeline has {len(error.problems)} problems:")
    for problem in error.problems:
        say_error(f"  {' '.join(str(problem).split())}", prefix="")


def _usage_line(error: Any) -> str:
    message = error.format_message().strip().rstrip(".")
    context = getattr(error, "ctx", None)
    command = NAME if context is None else context.command_path
    return f"{message} (see `{command} --help`)"


def main() -> None:
    """Entry point of the `draftloom` command."""
    if sys.platform == "linux":  # where a GPU is CUDA's; MLX asks for it at its first launch
        os.environ.setdefault(LAUNCHES_AT_ONCE, MOST_LAUNCHES)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows a "?"
            stream.reconfigure(errors="replace")
    # "Token indices sequence length is longer than ...": the context limit is checked by draftloom.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    sys.exit(run())
