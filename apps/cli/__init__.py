"""The command line, `draftloom`. `main` is its entry point; one module a command."""

from __future__ import annotations

from .app import build_app, main, run

__all__ = ["build_app", "main", "run"]
