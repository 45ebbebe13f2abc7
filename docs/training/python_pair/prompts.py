"""Cut prompts out of the corpus, for the target to go on from.

    python prompts.py --data CORPUS --tokenizer DIR --count 330000 --out prompts.npz

A prompt ends anywhere, or, for a share of them, behind the colon of a `def` line, where a function
body is to be written. It begins 64 to 192 tokens before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def def_lines(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Where the last token of a one-line `def ...:` stands."""
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(8192)]
    newline = np.array(["\n" in text for text in texts])[tokens]
    colon = np.array([text.endswith(":") for text in texts])[tokens]
    definition = np.array([text.strip() == "def" for text in texts])[tokens]
    place = np.arange(len(tokens))
    last_newline = np.maximum.accumulate(np.where(newline, place, -1))
    last_definition = np.maximum.accumulate(np.where(definition, place, -1))
    inside = last_definition[:-1] > last_newline[:-1]
    return np.flatnonzero(colon[:-1] & newline[1:] & inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--lengths", type=int, nargs=2, default=(64, 192))
    parser.add_argument("--bodies", type=float, default=0.4, help="share that ends in a def line")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    low, high = args.lengths
    files = sorted(args.data.glob("train*.bin"))
    tokens = np.concatenate([np.fromfile(file, np.uint16) for file in files])
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    random = np.random.RandomState(args.seed)
    lengths = random.randint(low, high + 1, args.count)
    ends = random.randint(high, len(tokens) - 1, args.count)
    bodies = random.rand(args.count) < args.bodies
    lines = def_lines(tokens, tokenizer)
    ends[bodies] = random.choice(lines[lines > high], bodies.sum())
    flat = np.concatenate([tokens[e + 1 - n : e + 1] for e, n in zip(ends, lengths, strict=True)])
    np.savez(args.out, tokens=flat, lengths=lengths.astype(np.int32))
    print(f"{args.count} prompts, {len(flat)} tokens, {bodies.sum()} end in a def line")


if __name__ == "__main__":
    main()
