"""Lets the target write the text that its drafter learns from.

Prompts of equal length are decoded together, in step: no row is padded, so that on a CPU each text
is the one the target writes alone. A shard is written under another name and renamed; what is there
is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from draftloom.errors import DraftloomError, UsageError

from .data import Document
from .target import FrozenTarget

__all__ = ["ResponseSettings", "Responses", "prompts_of"]

SHARD = 8
"""Batches of a shard."""
PREFILL = 512
"""Tokens of a prompt that are run at once."""
LOOK = 16
"""Steps between looks at whether all rows have ended."""


@attrs.frozen(kw_only=True)
class ResponseSettings:
    """How the target writes.

    Attributes:
        tokens: of a response at most.
        prompt_tokens: of a prompt that is cut out of plain text; a chat's or line's own is taken
            as it is.
        temperature: 0 is greedy.
        batch: texts at once. On MLX-CUDA 128 and more have been seen to crash with hybrid targets.
        limit: responses at most; None is one for every prompt there is.
        seed: of the choice of prompts, and of sampling.
    """

    tokens: int = 256
    prompt_tokens: int = 64
    temperature: float = 0.0
    batch: int = 32
    limit: int | None = None
    seed: int = 0

    def check(self) -> None:
        """See that the numbers make sense.

        Raises:
            UsageError: one of them does not; names it.
        """
        for name in ("tokens", "prompt_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} of responses must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"at least 1 response is needed, not {self.limit}")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"a temperature is 0 or more, got {self.temperature}")


def prompts_of(
    documents: Sequence[Document], settings: ResponseSettings, context: int
) -> list[tuple[int, ...]]:
    """Prompts for responses, in an order drawn with the seed, without equal ones.

    Args:
        documents: with a prompt, which is taken; or plain text, cut into prompts so far apart that
            a response fits between.
        settings: lengths, limit, seed.
        context: tokens that prompt and response share at most; of a longer prompt its end is taken.

    Raises:
        UsageError: no room for a prompt.
    """
    room = context - settings.tokens
    if room < 1:
        raise UsageError(
            f"responses of {settings.tokens} tokens leave no room for a prompt in a context of "
            f"{context}",
            "ask for shorter responses or a longer context",
        )
    found: dict[tuple[int, ...], None] = {}
    for document in documents:
        if document.prompt:
            found[tuple(document.ids[: document.prompt][-room:].tolist())] = None
            continue
        tokens = document.tokens
        size = min(settings.prompt_tokens, room, max(1, len(tokens) // 2))
        last = max(1, len(tokens) - size + 1)
        for begin in range(0, last, size + settings.tokens):
            found[tokens[begin : begin + size]] = None
    prompts = [prompt for prompt in found if prompt]
    random.Random(f"{settings.seed}/prompts").shuffle(prompts)
    return prompts[: settings.limit]


class Responses:
    """Responses of a target in a folder of JSON lines, which `--data` reads as well.

    Args:
        folder: made by `write`.
        target: writes them.
        fingerprint: of the target.
        prompts: from `prompts_of`.
        settings: how.

    Raises:
        UsageError: the folder holds responses to other prompts, of another target or otherwise
            made.
    """

    def __init__(
        self,
        folder: Path,
        target: FrozenTarget,
        fingerprint: str,
        prompts: Sequence[tuple[int, ...]],
        settings: ResponseSettings,
    ) -> None:
        settings.check()
        self._folder, self._target, self._settings = folder, target, settings
        self._batches = _batches(prompts, settings)
        self._total = len(prompts)
        shaping = attrs.asdict(settings)
        data = hashlib.sha256(repr(self._batches).encode()).hexdigest()
        self._key = {"target": fingerprint, "prompts": data, **shaping}
        index = folder / ".responses.json"
        if not index.is_file():
            return
        try:
            theirs = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{index} cannot be read: {error}", "delete the folder") from error
        other = sorted(n for n in {*theirs, *self._key} if theirs.get(n) != self._key.get(n))
        if other:
            raise UsageError(
                f"{folder} holds responses made otherwise: {', '.join(other)}",
                "give another folder, or delete it",
            )

    def _shards(self) -> Iterator[tuple[Path, int, int]]:
        """File, and its batches from one number up to another."""
        for number, begin in enumerate(range(0, len(self._batches), SHARD)):
            file = self._folder / f"responses-{number:05d}.jsonl"
            yield file, begin, min(begin + SHARD, len(self._batches))

    def write(self, on_done: Callable[[dict[str, Any]], None] = lambda record: None) -> list[Path]:
        """Write the shards that are not there yet.

        Args:
            on_done: told what is done after every batch.

        Returns:
            All shards, in order.

        Raises:
            DraftloomError: the disk refuses; whole shards are kept.
        """
        shards = list(self._shards())
        missing = [shard for shard in shards if not shard[0].is_file()]
        left = sum(len(batch) for _, begin, end in missing for batch in self._batches[begin:end])
        written, tokens, start = 0, 0, time.perf_counter()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._folder / ".responses.json", json.dumps(self._key, indent=1))
            for file, begin, end in missing:
                lines = []
                for number in range(begin, end):
                    for prompt, response in self._respond(number):
                        ids = {"prompt_ids": prompt, "response_ids": response}
                        lines.append(json.dumps(ids) + "\n")
                        written, tokens = written + 1, tokens + len(response)
                    seconds = time.perf_counter() - start
                    on_done(
                        {
                            "kind": "responses",
                            "done": self._total - left + written,
                            "total": self._total,
                            "tokens_per_second": tokens / max(seconds, 1e-9),
                            "seconds_left": (left - written) * seconds / written,
                        }
                    )
                _write(file, "".join(lines))
        except OSError as error:
            raise DraftloomError(
                f"responses cannot be written in {self._folder}: {error.strerror or error}",
                "make room and start again: whole shards are kept",
            ) from error
        return [file for file, *_ in shards]

    def _respond(self, number: int) -> Iterator[tuple[list[int], list[int]]]:
        """Prompts and responses of a batch. From a key of its own: no global random state."""
        prompts, settings = self._batches[number], self._settings
        digest = hashlib.sha256(f"{settings.seed}/response/{number}".encode()).digest()
        key = mx.random.key(int.from_bytes(digest[:8], "big"))
        ends = set(getattr(self._target.tokenizer, "eos_token_ids", None) or ())
        rows = _decode(self._target, prompts, settings, ends, key)
        for prompt, row in zip(prompts, rows, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            yield list(prompt), row[:end]


def _batches(
    prompts: Sequence[tuple[int, ...]], settings: ResponseSettings
) -> list[list[tuple[int, ...]]]:
    """Prompts of equal length, `batch` at once; the batches in an order drawn with the seed, so
    that the time left can be told from the time so far."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt), []).append(prompt)
    batches = [
        same[begin : begin + settings.batch]
        for _, same in sorted(by_length.items())
        for begin in range(0, len(same), settings.batch)
    ]
    random.Random(f"{settings.seed}/batches").shuffle(batches)
    return batches


def _decode(
    target: FrozenTarget,
    prompts: Sequence[tuple[int, ...]],
    settings: ResponseSettings,
    ends: set[int],
    key: mx.array,
) -> list[list[int]]:
    """`settings.tokens` tokens after each prompt, or fewer where every row has ended."""
    cache = target.make_cache()
    tokens = mx.array(list(prompts), dtype=mx.int32)
    while tokens.shape[1] > 1:  # the last one gives the logits
        size = min(PREFILL, tokens.shape[1] - 1)
        target.forward(tokens[:, :size], cache)
        mx.eval([entry.state for entry in cache])
        tokens = tokens[:, size:]
    rows: list[mx.array] = []
    ended = mx.zeros(len(prompts), dtype=mx.bool_)
    stops = mx.array(sorted(ends) or [-1])
    current = tokens
    for step in range(settings.tokens):
        logits = target.forward(current, cache).logits[:, -1].astype(mx.float32)
        if settings.temperature == 0:
            chosen = mx.argmax(logits, axis=-1)
        else:
            key, own = mx.random.split(key)
            chosen = mx.random.categorical(logits / settings.temperature, key=own)
        chosen = chosen.astype(mx.int32)
        ended = ended | (chosen[:, None] == stops).any(axis=-1)
        rows.append(chosen)
        mx.async_eval(chosen, ended)
        current = chosen[:, None]
        if step % LOOK == LOOK - 1 and ended.all().item():
            break
    found: Any = mx.stack(rows, axis=1).tolist()
    return found  # type: ignore[no-any-return]


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".writing-{file.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
