"""Training text: read, tokenize, de-duplicate, split by document, pack.

Three kinds of file. JSON lines (.jsonl), every line one of

- ``{"messages": [...]}``: a chat; its assistant turns are trained on;
- ``{"prompt": "...", "response": "..."}``: the response is trained on;
- ``{"text": "..."}``: all of it is trained on;
- ``{"tokens": [...], "prompt_tokens": n}``: token ids; what follows the first n is trained on;
- ``{"prompt_ids": [...], "response_ids": [...]}``: token ids; the response is trained on.

A file in safetensors holds token ids as arrays (`token_ids.token_rows`). Any other file is plain
text, all of it trained on; of a folder, every UTF-8 file in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from draftloom.errors import UsageError

from .document import Document, Packed
from .token_ids import plain_line, token_rows

__all__ = ["Corpus", "Document", "Packed", "pack", "read_corpus"]

LARGEST_SOURCE = 4 * 2**20
"""Bytes of a file of a folder; longer ones are data, not text."""


@attrs.frozen
class Corpus:
    """What a run trains on and is measured on.

    Attributes:
        train, held_out: documents; none is in both.
        duplicates: documents left out because an equal one was there.
        fingerprint: sha256 over all digests in order.
    """

    train: tuple[Document, ...] = attrs.field(repr=False)
    held_out: tuple[Document, ...] = attrs.field(repr=False)
    duplicates: int
    fingerprint: str


def read_corpus(
    files: Sequence[Path], tokenizer: Any, vocab_size: int, *, held_out: float, seed: int
) -> Corpus:
    """Read, check, de-duplicate and split.

    Args:
        files: files and folders.
        tokenizer: mlx-lm's TokenizerWrapper; None allows ``tokens`` lines only.
        vocab_size: V of the target.
        held_out: share of the documents to keep apart, at least one unless 0.
        seed: of the split.

    Raises:
        UsageError: a file or line that cannot be used (names it), an id outside the vocabulary,
            no document, or too few to keep one apart.
    """
    reader = _Reader(tokenizer, vocab_size)
    unique: dict[str, Document] = {}
    count = 0
    for document in (d for file in files for d in reader.file(Path(file))):
        count += 1
        unique.setdefault(document.digest, document)
    if not unique:
        names = ", ".join(map(str, files)) or "nothing"
        raise UsageError(f"no document to train on in {names}", "give files with text")
    order = sorted(unique, key=lambda d: hashlib.sha256(f"{seed}/{d}".encode()).digest())
    kept = max(1, round(held_out * len(order))) if held_out else 0
    if kept >= len(order):
        raise UsageError(
            f"{len(order)} document cannot be split into training and held-out",
            "give more documents, or a held-out share of 0",
        )
    chosen = set(order[:kept])
    return Corpus(
        train=tuple(d for key, d in unique.items() if key not in chosen),
        held_out=tuple(unique[key] for key in order[:kept]),
        duplicates=count - len(unique),
        fingerprint=hashlib.sha256("".join(unique).encode()).hexdigest(),
    )


class _Reader:
    """Turns files into documents."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def file(self, path: Path) -> Iterator[Document]:
        """The documents of a file, or of every text file of a folder."""
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                hidden = any(part.startswith(".") for part in inner.relative_to(path).parts)
                if hidden or inner.stat().st_size > LARGEST_SOURCE:
                    continue
                try:
                    text = inner.read_text(encoding="utf-8")
                except UnicodeDecodeError:  # a picture, an archive: a folder may hold others
                    continue
                if inner.suffix == ".jsonl":
                    yield from self._lines(inner, text.encode().splitlines())
                else:
                    yield from self._whole_text(inner, text)
            return
        if path.suffix == ".safetensors":
            for ids, prompt, source in token_rows(path):
                yield self._response(ids, prompt, source)
            return
        try:
            if path.suffix == ".jsonl":
                with path.open("rb", buffering=2**22) as lines:
                    yield from self._lines(path, lines)
            else:
                yield from self._whole_text(path, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"data file {path} cannot be read: {reason}", "give UTF-8 text or JSON lines"
            ) from error

    def _lines(self, path: Path, lines: Iterable[bytes]) -> Iterator[Document]:
        for number, line in enumerate(lines, 1):
            plain = plain_line(line)
            if plain is not None and self._fits(plain[0]):  # else JSON says what they were
                yield self._made(*plain, f"{path}, line {number}")
            elif line.strip():
                yield self._line(line.decode("utf-8"), f"{path}, line {number}")

    def _whole_text(self, path: Path, text: str) -> Iterator[Document]:
        if text.strip():
            yield self._text(text, str(path))

    def _line(self, line: str, source: str) -> Document:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{source}: no JSON: {error}", "one object a line") from error
        kinds: dict[str, Callable[[Any, str], Document]] = {
            "messages": self._chat,
            "tokens": self._tokens,
            "prompt_ids": self._ids,
            "prompt": self._prompt,
            "text": lambda r, s: self._text(r["text"], s),
        }
        for key, make in kinds.items():
            if isinstance(record, dict) and key in record:
                try:
                    return make(record, source)
                except (TypeError, KeyError, AttributeError, ValueError) as error:
                    if isinstance(error, UsageError):
                        raise
                    raise UsageError(
                        f"{source}: {key!r} cannot be used: {type(error).__name__}: {error}",
                        "draftloom train drafter --help names the forms",
                    ) from error
        raise UsageError(
            f"{source}: no object with one of {', '.join(kinds)}", "write one of these on a line"
        )

    def _encode(self, text: Any, source: str, special: bool = True) -> list[int]:
        if self._tokenizer is None:
            raise UsageError(f"{source}: the target has no tokenizer", 'give {"tokens": [...]}')
        if not isinstance(text, str):
            raise UsageError(f"{source}: a text is needed, not {text!r:.40}")
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def _text(self, text: Any, source: str) -> Document:
        ids = self._encode(text, source)
        return self._response(ids, 0, source)

    def _tokens(self, record: Any, source: str) -> Document:
        ids, prompt = tuple(record["tokens"]), record.get("prompt_tokens", 0)
        _whole(ids, source)
        if not isinstance(prompt, int) or not 0 <= prompt <= len(ids):
            raise UsageError(f"{source}: prompt_tokens is no number from 0 to {len(ids)}")
        return self._response(ids, prompt, source)

    def _ids(self, record: Any, source: str) -> Document:
        prompt, answer = tuple(record["prompt_ids"]), tuple(record["response_ids"])
        _whole((*prompt, *answer), source)
        return self._response((*prompt, *answer), len(prompt), source)

    def _eos(self) -> list[int]:
        eos = getattr(self._tokenizer, "eos_token_id", None)
        return [] if eos is None else [int(eos)]

    def _prompt(self, record: Any, source: str) -> Document:
        response = record.get("response", record.get("completion"))
        if response is None:
            raise UsageError(
                f'{source}: a prompt without a "response"', "let the target answer it first"
            )
        prompt = self._encode(record["prompt"], source)
        answer = self._encode(response, source, special=False)
        return self._response([*prompt, *answer, *self._eos()], len(prompt), source)

    def _chat(self, record: Any, source: str) -> Document:
        """The chat up to its last assistant turn, through the template."""
        tokenizer, messages = self._tokenizer, list(record["messages"])
        if tokenizer is None or not tokenizer.has_chat_template:
            raise UsageError(f"{source}: the target has no chat template", "give prompt and text")
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise UsageError(f"{source}: no assistant message that answers another")
        last = turns[-1]
        full = list(tokenizer.apply_chat_template(messages[: last + 1]))
        trained = [False] * len(full)
        for turn in turns:
            before = list(
                tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True)
            )
            after = list(tokenizer.apply_chat_template(messages[: turn + 1]))
            # Templates may write an old turn in another way than one that is being answered;
            # such a turn is context only.
            if full[: len(after)] == after and after[: len(before)] == before:
                trained[len(before) : len(after)] = [True] * (len(after) - len(before))
            elif turn == last:
                answer = self._encode(messages[last]["content"], source, special=False)
                return self._response([*before, *answer, *self._eos()], len(before), source)
        prompt = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True)
        return Document(self._inside(full, source), trained, len(prompt), source)

    def _response(self, ids: Any, prompt: int, source: str) -> Document:
        """A document that is trained on after its first `prompt` tokens."""
        return self._made(self._inside(ids, source), prompt, source)

    @staticmethod
    def _made(ids: np.ndarray, prompt: int, source: str) -> Document:
        mask = np.ones(len(ids), dtype=np.bool_)
        mask[:prompt] = False
        return Document(ids, mask, prompt, source)

    def _fits(self, ids: np.ndarray) -> bool:
        # As numbers without a sign, negative ones are large.
        return not ids.size or bool(ids.view(np.uint64).max() < self._vocab_size)

    def _inside(self, ids: Any, source: str) -> np.ndarray:
        """[T] int32; all within the vocabulary."""
        try:
            found = np.asarray(ids, dtype=np.int64)
            inside = self._fits(found)
        except OverflowError:
            inside = False
        if not inside:
            outside = next(t for t in ids if not 0 <= t < self._vocab_size)
            raise UsageError(
                f"{source}: token id {outside} is outside the target's vocabulary of "
                f"{self._vocab_size}",
                "was it tokenized for another model?",
            )
        return found.astype(np.int32)


def _whole(ids: tuple[Any, ...], source: str) -> None:
    if not set(map(type, ids)) <= {int}:
        raise UsageError(f"{source}: tokens are whole numbers")


def pack(documents: Sequence[Document], context: int, separator: int | None) -> tuple[Packed, ...]:
    """Sequences of at most `context` tokens.

    Texts follow one another, with the separator between them, and are cut where a sequence is
    full. A document with a prompt is a sequence of its own, cut at its end: its response must be
    drafted from its own prompt alone.

    Raises:
        UsageError: no sequence has two trained tokens in a row after another token.
    """
    packed = [Packed.of(d, context) for d in documents if d.prompt]
    texts = [d for d in documents if not d.prompt]
    if texts:
        end = np.array([] if separator is None else [separator], dtype=np.int32)
        tokens = np.concatenate([part for d in texts for part in (d.ids, end)])
        learned = np.ones(len(end), dtype=np.bool_)
        trained = np.concatenate([part for d in texts for part in (d.mask, learned)])
        sizes = [len(d) + len(end) for d in texts]
        numbers = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
        for begin in range(0, len(tokens), context):
            part = slice(begin, begin + context)
            packed.append(Packed(tokens[part], trained[part], numbers[part]))
    usable = tuple(p for p in packed if p.usable)
    if not usable:
        raise UsageError(
            f"none of {len(documents)} documents has two tokens to train on within {context}",
            "are the prompts longer than the context, or the responses empty?",
        )
    return usable
