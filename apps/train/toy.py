"""A target of toy size for the tutorial and the tests: it counts, and knows days and months.

Small enough to be trained here and now, and predictable, so that a drafter can be seen to learn.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

__all__ = ["make_toy", "toy_texts"]

CYCLES = (
    "monday tuesday wednesday thursday friday saturday sunday",
    "january february march april may june july august september october november december",
    "one two three four five six seven eight nine ten",
)
_SPECIAL = ("<eos>", "<unk>")


def toy_texts(count: int, words: int, seed: int) -> list[str]:
    """Texts that begin somewhere in a week, a year or at a number, and go round and round."""
    stream = random.Random(seed)
    texts = []
    for _ in range(count):
        cycle = stream.choice(CYCLES).split()
        begin = stream.randrange(len(cycle))
        texts.append(" ".join(cycle[(begin + i) % len(cycle)] for i in range(words)))
    return texts


def make_toy(folder: Path | str, *, steps: int = 40, seed: int = 0) -> Path:
    """Train the toy target for a few seconds and write it with some texts.

    Args:
        folder: gets ``target`` (a model folder) and ``texts.jsonl``.
        steps: of training.
        seed: of weights and texts.

    Returns:
        The folder.
    """
    folder = Path(folder)
    words = [*_SPECIAL, *sorted({w for cycle in CYCLES for w in cycle.split()})]
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(words) + 2,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    target = folder / "target"
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    _write_tokenizer(target, vocabulary)
    texts = toy_texts(64, 24, seed)
    model = _train(config, [[vocabulary[w] for w in t.split()] for t in texts], steps, seed)
    flat: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(target / "model.safetensors"), dict(flat), {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    # Every text in its own words, else equal ones would be taken out.
    stream = random.Random(seed)
    texts = [t for n in range(200) for t in toy_texts(1, stream.randrange(20, 44), seed + n)]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder


def _write_tokenizer(target: Path, vocabulary: dict[str, int]) -> None:
    """A tokenizer whose tokens are whole words."""
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _train(config: dict[str, Any], texts: list[list[int]], steps: int, seed: int) -> nn.Module:
    mx.random.seed(seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    optimizer = optim.Adam(5e-3)
    stream = random.Random(seed)

    def loss(model: nn.Module, rows: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")

    step = nn.value_and_grad(model, loss)
    for _ in range(steps):
        _, gradient = step(model, mx.array(stream.sample(texts, 8)))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    return model
