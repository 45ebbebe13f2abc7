"""Acceptance length of a drafter on held-out documents, by the decoder that users run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from draftloom.builder import PipelineBuilder
from draftloom.plugins import PluginManager

from .data import Document
from .target import FrozenTarget

__all__ = ["Measured", "measure", "prompt_of"]


@attrs.frozen
class Measured:
    """A measurement, over all prompts together.

    Attributes:
        tau: 1 + accepted / cycles.
        by_position: share of cycles that accepted draft position i, of those that verified it.
        cycles, tokens, prompts: how much it rests on.
        fell_back: prompts that the drafter was given up on.
    """

    tau: float
    by_position: tuple[float, ...]
    cycles: int
    tokens: int
    prompts: int
    fell_back: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the log."""
        return {**attrs.asdict(self), "by_position": list(self.by_position)}


def prompt_of(document: Document, limit: int) -> tuple[int, ...]:
    """What the decoder is given: the prompt, or the first half of a text; `limit` tokens at most,
    the last ones."""
    size = document.prompt or max(1, len(document) // 2)
    return document.tokens[:size][-limit:]


def measure(
    target: FrozenTarget,
    plugins: PluginManager,
    drafter: Path,
    documents: Sequence[Document],
    *,
    max_tokens: int,
    context: int,
) -> Measured:
    """Decode greedily after the beginning of each document with a drafter's checkpoint.

    Args:
        target: steps aside meanwhile.
        plugins: for the pipeline.
        drafter: folder of the checkpoint.
        documents: held out.
        max_tokens: a text.
        context: tokens of a prompt at most.

    Raises:
        GraphError, ModelError: the checkpoint does not fit the target.
        GenerationError: the target failed.
    """
    accepted = cycles = tokens = gave_up = 0
    reached: list[int] = []
    looked: list[int] = []
    with target.released() as model:
        builder = PipelineBuilder(plugins=plugins).model(model, target.tokenizer).own_width()
        with builder.drafter("dflash", checkpoint=str(drafter)).build() as pipeline:
            for document in documents:
                prompt = prompt_of(document, context)
                stats = pipeline.generate(prompt, max_tokens=max_tokens, temperature=0.0).stats
                accepted, cycles = accepted + stats.accepted, cycles + stats.cycles
                tokens, gave_up = tokens + stats.generated_tokens, gave_up + bool(stats.fell_back)
                missing = len(stats.verified_by_position) - len(looked)
                looked += [0] * missing
                reached += [0] * missing
                for i, count in enumerate(stats.verified_by_position):
                    looked[i] += count
                    reached[i] += stats.accepted_by_position[i]
    shares = tuple(a / max(1, n) for a, n in zip(reached, looked, strict=True))
    return Measured(1 + accepted / max(1, cycles), shares, cycles, tokens, len(documents), gave_up)
