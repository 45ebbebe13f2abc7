"""What is generated from: suites written for this project, and local data sets in JSON lines."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

from draftloom.errors import UnknownNameError, UsageError

__all__ = [
    "DATASET_FORMATS",
    "BenchPrompt",
    "EncodedPrompt",
    "built_in_suites",
    "load_dataset",
    "load_suite",
]

DATASET_FORMATS = "gsm8k, math500, humaneval, mbpp, mt-bench"


@attrs.frozen
class BenchPrompt:
    """One prompt.

    Attributes:
        suite: name of its suite, or of its data set's format and file.
        text: what the model is asked.
    """

    suite: str
    text: str


@attrs.frozen
class EncodedPrompt:
    """A prompt as token ids.

    Attributes:
        suite: where it is from.
        ids: token ids.
    """

    suite: str
    ids: tuple[int, ...]


def _suites() -> Mapping[str, Sequence[str]]:
    text = files("draftloom.apps.bench").joinpath("suites.toml").read_text(encoding="utf-8")
    return {name: tuple(table["prompts"]) for name, table in tomllib.loads(text).items()}


def built_in_suites() -> tuple[str, ...]:
    """Names of the suites that come with draftloom."""
    return tuple(_suites())


def load_suite(name: str, limit: int | None = None) -> list[BenchPrompt]:
    """The first `limit` prompts of a built-in suite; all by default.

    Raises:
        UnknownNameError: no such suite.
    """
    suites = _suites()
    if name not in suites:
        raise UnknownNameError("suite", name, suites)
    return [BenchPrompt(name, text) for text in suites[name][:limit]]


def load_dataset(file: Path, limit: int | None = None) -> list[BenchPrompt]:
    """The first `limit` prompts of a JSON-lines file; its format is told from its keys.

    Raises:
        UsageError: it cannot be read, holds nothing, or a line has none of the known formats.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"data set {file} cannot be read: {reason}") from error
    prompts: list[BenchPrompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(prompts) >= limit:
            break
        prompts.append(_prompt(file, number, line))
    if not prompts:
        raise UsageError(f"data set {file} holds no line", "one JSON object a line is needed")
    return prompts


def _prompt(file: Path, number: int, line: str) -> BenchPrompt:
    where = f"data set {file}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON", "one JSON object a line is needed") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: not a JSON object", f"known formats: {DATASET_FORMATS}")
    found = _detect(record)
    if found is None:
        keys = ", ".join(sorted(map(str, record))) or "none"
        raise UsageError(f"{where}: unknown format (keys: {keys})", f"known: {DATASET_FORMATS}")
    kind, text = found
    if not isinstance(text, str) or not text:
        raise UsageError(f"{where}: looks like {kind}, but its prompt is no text")
    return BenchPrompt(f"{kind}:{file.stem}", text)


def _detect(record: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Format and prompt of a record; of mt-bench the first turn."""
    if isinstance(record.get("turns"), list):
        return "mt-bench", next(iter(record["turns"]), None)
    if {"prompt", "entry_point"} <= record.keys():
        return "humaneval", record["prompt"]
    if "test_list" in record and record.keys() & {"text", "prompt"}:
        return "mbpp", record.get("text", record.get("prompt"))
    if "problem" in record and record.keys() & {"solution", "answer"}:
        return "math500", record["problem"]
    if {"question", "answer"} <= record.keys():
        return "gsm8k", record["question"]
    return None
