"""Snippets in README.md and docs/ run as tests (Sybil).

Python blocks of one page share a namespace and run top to bottom in an empty folder. A TOML block
whose first line is a comment with a file name is written there. In `console` blocks every line
`$ draftloom ...` runs, and the lines under it are what it must print (`...` stands for anything).
Nothing else is a test; what needs a download is skipped with a reason that pytest shows.
"""

import contextlib
import doctest
import io
import os
import shlex
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

PRINTED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
CACHES = pytest.StashKey[tuple[tempfile.TemporaryDirectory[str], str | None]]()


def pytest_configure(config: pytest.Config) -> None:
    """What is kept between runs (costs of cycles) is not kept where the user's own is."""
    folder = tempfile.TemporaryDirectory()
    config.stash[CACHES] = (folder, os.environ.get("XDG_CACHE_HOME"))
    os.environ["XDG_CACHE_HOME"] = folder.name


def pytest_unconfigure(config: pytest.Config) -> None:
    """Put the environment back."""
    folder, before = config.stash[CACHES]
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before
    folder.cleanup()


def begin_document(namespace: dict[str, Any]) -> None:
    """Go to an empty folder, and to the CPU, where every device's answers are the same."""
    folder = tempfile.TemporaryDirectory()
    namespace["_before"] = (folder, os.getcwd(), mx.default_device())
    os.chdir(folder.name)
    mx.set_default_device(mx.cpu)


def end_document(namespace: dict[str, Any]) -> None:
    """Go back to where the tests run."""
    folder, before, device = namespace["_before"]
    mx.set_default_device(device)
    os.chdir(before)
    folder.cleanup()


def run_console(example: Example) -> str | None:
    """Run the commands of a console block; return what is wrong, None if nothing is."""
    from draftloom.apps.cli import run

    for command, expected in commands(str(example.parsed)):
        if command[0] != "draftloom":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run(command[1:])
        output = printed.getvalue()
        if expected and not doctest.OutputChecker().check_output(expected, output, PRINTED):
            return f"{shlex.join(command)} should print\n{expected}\nand prints\n{output}"
        if not expected and code:
            return f"{shlex.join(command)} exits with {code}:\n{output}"
    return None


def commands(block: str) -> list[tuple[list[str], str]]:
    """The commands of a console block, split into words, each with the output under it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (found[-1][0][:-1] + line.strip(), [])
        elif found:
            found[-1][1].append(line)
    return [(shlex.split(text, comments=True), "\n".join(out).strip()) for text, out in found]


def write_toml(example: Example) -> None:
    """Parse a TOML block; write it to the file that its first line names."""
    text = str(example.parsed)
    tomllib.loads(text)
    first = text.partition("\n")[0]
    if first.startswith("# ") and first.endswith(".toml"):
        Path(first[2:]).write_text(text, encoding="utf-8")


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
        CodeBlockParser(language="console", evaluator=run_console),
        CodeBlockParser(language="toml", evaluator=write_toml),
        SkipParser(),
    ],
    patterns=["*.md"],
    # A distribution of its own: tests/e2e/test_third_party.py installs it and runs its README.
    excludes=["docs/examples/*/*.md"],
    setup=begin_document,
    teardown=end_document,
).pytest()
