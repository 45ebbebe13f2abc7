"""What the commands of one run share: the plugin manager, made when it is first needed."""

from __future__ import annotations

import time
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from draftloom.plugins import PluginManager

__all__ = ["ENTRY_POINT_GROUP", "CliState", "state_of"]

ENTRY_POINT_GROUP = "draftloom"


class CliState:
    """One run of the command line.

    Args:
        plugins: a plugin manager; by default one with all installed plugins, made on first use,
            so that `draftloom --help` waits for no model library.

    Attributes:
        begin: when, by `time.perf_counter`, the run began.
    """

    def __init__(self, plugins: PluginManager | None = None) -> None:
        self._plugins = plugins
        self.begin = time.perf_counter()

    @property
    def plugins(self) -> PluginManager:
        """The plugin manager.

        Raises:
            PluginError: an installed plugin is broken.
        """
        if self._plugins is None:
            from draftloom.plugins import PluginManager

            self._plugins = PluginManager()
        return self._plugins

    @property
    def may_have_commands(self) -> bool:
        """Whether any third party could add commands: only then are plugins needed for `--help`."""
        return self._plugins is not None or bool(entry_points(group=ENTRY_POINT_GROUP))


def state_of(context: typer.Context) -> CliState:
    """The state that the application put on a command's context."""
    state = context.find_root().obj
    if not isinstance(state, CliState):  # a command that is run by itself, as in a test
        state = context.find_root().obj = CliState()
    return state
