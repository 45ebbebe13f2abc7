"""Documents and sequences: token ids in arrays of numpy, a few bytes a token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import attrs
import numpy as np

__all__ = ["Document", "Packed", "repr_digest"]


def _ids(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def _mask(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.bool_)


@lru_cache(maxsize=4096)
def _zeros(count: int) -> np.ndarray:
    zeros = np.zeros(count, dtype=np.int32)
    zeros.flags.writeable = False  # it is shared
    return zeros


@attrs.frozen(eq=False)
class _Tokens:
    """Token ids, and which of them are trained on."""

    ids: np.ndarray = attrs.field(repr=False, converter=_ids)
    mask: np.ndarray = attrs.field(repr=False, converter=_mask)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> tuple[int, ...]:
        """`ids` as Python's numbers; made anew each time."""
        return tuple(self.ids.tolist())

    @property
    def trained(self) -> tuple[bool, ...]:
        """`mask` as Python's truth values; made anew each time."""
        return tuple(self.mask.tolist())


@attrs.frozen(eq=False)
class Document(_Tokens):
    """A text to train on. Equal ones have equal contents, and equal hashes.

    Attributes:
        ids: [T] int32, token ids; made of any sequence of them.
        mask: [T] bool, whether each token is one that the drafter learns to predict.
        prompt: tokens before the (last) response; 0 where all of it is text.
        source: file, and line where it has lines.
    """

    prompt: int
    source: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Document) and self._contents() == other._contents()

    def __hash__(self) -> int:
        return hash(self._contents())

    def _contents(self) -> tuple[object, ...]:
        return self.ids.tobytes(), self.mask.tobytes(), self.prompt, self.source

    @property
    def digest(self) -> str:
        """sha256 of tokens and mask: equal documents are one."""
        total = hashlib.sha256(self.ids.astype(np.int64).data)
        total.update(np.ascontiguousarray(self.mask).data)
        return total.hexdigest()


@attrs.frozen(eq=False)
class Packed(_Tokens):
    """A sequence as it is run.

    Attributes:
        ids: [T] int32, at most the context.
        mask: [T] bool, as of `Document`.
        numbers: [T] int32, number of the document that each token is of, within the sequence.
    """

    numbers: np.ndarray = attrs.field(repr=False, converter=_ids)

    @classmethod
    def of(cls, document: Document, context: int) -> Packed:
        """The beginning of a document, of at most `context` tokens; nothing is copied."""
        ids = document.ids[:context]
        return cls(ids, document.mask[:context], _zeros(len(ids)))

    @property
    def segments(self) -> tuple[int, ...]:
        """`numbers` as Python's numbers; made anew each time."""
        return tuple(self.numbers.tolist())

    @property
    def usable(self) -> bool:
        """Whether a block can begin anywhere: at a token that is trained on, that has one before
        it, and one after it that is trained on and of the same document."""
        mask, numbers = self.mask, self.numbers
        both = mask[1:-1] & mask[2:]
        if len(numbers) and numbers[0] != numbers[-1]:  # of more than one document
            both &= numbers[1:-1] == numbers[2:]
        return bool(both.any())


def repr_digest(sequences: Sequence[Packed]) -> str:
    """sha256 of what `repr` says of the list of all tuples of tokens, without making it."""
    total = hashlib.sha256(b"[")
    for number, sequence in enumerate(sequences):
        total.update((", " if number else "").encode() + repr(sequence.tokens).encode())
    total.update(b"]")
    return total.hexdigest()
