"""Token ids from files, without a Python number for each.

A line of JSON that is written as `json.dumps` writes it is read by numpy; any other is left to the
JSON parser, which knows what is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from draftloom.errors import UsageError

__all__ = ["plain_line", "token_rows"]

_LIST = rb"\[([^\]]*)\]"
_RESPONSE = re.compile(
    rb'\s*\{\s*"prompt_ids"\s*:\s*'
    + _LIST
    + rb'\s*,\s*"response_ids"\s*:\s*'
    + _LIST
    + rb"\s*\}\s*"
)
_TOKENS = re.compile(
    rb'\s*\{\s*"tokens"\s*:\s*' + _LIST + rb'\s*(?:,\s*"prompt_tokens"\s*:\s*(0|[1-9]\d*)\s*)?\}\s*'
)
_LEADING_ZERO = re.compile(rb"(?<![0-9])0[0-9]")


def plain_line(line: bytes) -> tuple[np.ndarray, int] | None:
    """Token ids of a line with prompt and response ids, or with tokens.

    Returns:
        [T] int64 and the number of those before the response; None where the line has to be read
        as JSON: it is something else, or may be wrong.
    """
    found = _RESPONSE.fullmatch(line)
    if found is not None:
        prompt, answer = found[1], found[2]
        between = b", " if b" " in prompt else b","
        both = _numbers(prompt + between + answer if prompt and answer else prompt or answer)
        return None if both is None else (both, prompt.count(b",") + 1 if prompt else 0)
    found = _TOKENS.fullmatch(line)
    if found is None:
        return None
    ids, before = _numbers(found[1]), int(found[2] or 0)
    return None if ids is None or before > len(ids) else (ids, before)


def _numbers(text: bytes) -> np.ndarray | None:
    """Numbers with ``,`` or ``, `` between; None for anything that is not exactly this."""
    if not text:
        return np.zeros(0, dtype=np.int64)
    marks = text.translate(None, b"0123456789")
    between = b", " if marks[1:2] == b" " else b","
    count = len(marks) // len(between)
    if (
        marks != between * count
        or text.count(between) != count
        or between + b"," in text
        or not (text[:1].isdigit() and text[-1:].isdigit())
        or ((text[:1] == b"0" or between + b"0" in text) and _LEADING_ZERO.search(text))
    ):
        return None
    numbers = np.fromstring(text, dtype=np.int64, sep=",")
    return numbers if len(numbers) == count + 1 else None


def token_rows(path: Path) -> Iterator[tuple[np.ndarray, int, str]]:
    """Rows of a file in safetensors: ``tokens`` [N, T], ``lengths`` [N] and ``prompts`` [N], all
    whole numbers; what follows the first ``prompts`` of ``lengths`` tokens is trained on.

    Returns:
        Of every row [lengths] ids, prompt and source.

    Raises:
        UsageError: a file that cannot be read, or holds something else; names it.
    """
    try:
        loaded: Any = mx.load(str(path))
        arrays = {name: np.array(loaded[name]) for name in ("tokens", "lengths", "prompts")}
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"data file {path} cannot be read: {reason}", _FORM) from error
    except KeyError as error:
        raise UsageError(f"data file {path} holds no {error}", _FORM) from error
    if not all(np.issubdtype(array.dtype, np.integer) for array in arrays.values()):
        raise UsageError(f"{path}: tokens, lengths and prompts are whole numbers", _FORM)
    tokens, lengths, prompts = arrays["tokens"], arrays["lengths"], arrays["prompts"]
    if tokens.ndim != 2 or not lengths.shape == prompts.shape == tokens.shape[:1]:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise UsageError(f"{path}: {shapes} do not go together", _FORM)
    pairs = zip(lengths.tolist(), prompts.tolist(), strict=True)
    for number, (length, prompt) in enumerate(pairs):
        source = f"{path}, row {number}"
        if not 0 <= length <= tokens.shape[1]:
            raise UsageError(f"{source}: lengths is no number from 0 to {tokens.shape[1]}", _FORM)
        if not 0 <= prompt <= length:
            raise UsageError(f"{source}: prompts is no number from 0 to {length}", _FORM)
        yield tokens[number, :length], prompt, source


_FORM = "give tokens [N, T], lengths [N] and prompts [N]"
