"""Prompts of the user's own data, in the forms that training reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftloom.apps.bench.prompts import EncodedPrompt
from draftloom.apps.train.data import read_corpus
from draftloom.apps.train.evaluate import prompt_of

__all__ = ["data_prompts"]


def data_prompts(
    files: Sequence[Path],
    tokenizer: Any,
    vocab_size: int,
    *,
    limit: int,
    longest: int,
    seed: int = 0,
) -> list[EncodedPrompt]:
    """Prompts of files and folders; the content type of each is the name of what it was read from.

    Args:
        files: as `draftloom train drafter --data` takes them.
        tokenizer: of the target.
        vocab_size: of the target.
        limit: prompts of each file or folder, drawn with the seed.
        longest: tokens of a prompt; of a longer one its end is taken.
        seed: of the draw.

    Raises:
        UsageError: nothing there, or a line that cannot be used; names it.
    """
    found = []
    for file in files:
        corpus = read_corpus([file], tokenizer, vocab_size, held_out=0.0, seed=seed)
        prompts = list(dict.fromkeys(prompt_of(d, longest) for d in corpus.train if d.tokens))
        random.Random(f"{seed}/eval").shuffle(prompts)
        found += [EncodedPrompt(file.stem, prompt) for prompt in prompts[:limit]]
    return found
