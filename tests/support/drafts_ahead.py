"""Drafts that a session makes before it is known what was kept, against those made after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from draftloom import SamplingParams, SamplingState
from draftloom.contracts import DraftRequest

from . import models, pipelines

__all__ = ["BLOCK", "CYCLES", "disagreements"]

CYCLES, BLOCK = 40, 6


def disagreements(
    folder: Path, kernels: Mapping[str, str], options: Mapping[str, Any], **config: Any
) -> tuple[list[int], int]:
    """Run two sessions of a random drafter over the same features, of which a changing number is
    kept in each cycle; one of them drafts ahead where it can.

    Args:
        folder: for its checkpoint.
        kernels: choices on top of ``compiled-draft=ahead``.
        options: of the drafter.
        **config: of the checkpoint.

    Returns:
        The cycles whose drafts differ or are not finite, and how many drafts were made ahead.
    """
    checkpoint = pipelines.dflash_checkpoint(
        folder / "dflash", hidden=models.HIDDEN, vocab=models.VOCAB, taps=(0, 2), **config
    )
    builder = pipelines.builder(models.build("qwen3"))
    builder = builder.kernels({"compiled-draft": "ahead", **kernels})
    builder = builder.drafter("dflash", checkpoint=str(checkpoint), **options)
    sampling, wrong, made = SamplingState(SamplingParams()), [], 0
    with builder.build() as pipeline:
        drafter = pipeline._parts.drafter
        prompt = tuple(i * 7 % models.VOCAB for i in range(1, 9))
        request = DraftRequest((prompt,), sampling, models.VOCAB)
        ours, plain = drafter.open(request), drafter.open(request)
        assert ours.ahead
        for cycle, key in enumerate(mx.random.split(mx.random.key(4), CYCLES)):
            features = mx.random.normal((1, BLOCK, 2 * models.HIDDEN), key=key)
            kept, anchor = 1 + cycle * 5 % BLOCK, mx.array([cycle % models.VOCAB])
            count, width = 5 - cycle % 2, 4 if cycle % 9 == 8 else 5
            made += ours.propose_ahead(features, mx.array([kept]), anchor, 5, count) is not None
            drafts = []
            for session in (ours, plain):
                session.observe(((0,) * kept,), features[:, :kept])
                # Where another width is asked for, it is drafted anew.
                drafts.append(session.propose_first(anchor, width, min(count, 3), sampling))
            same = drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
            if not same or not all(bool(draft.healthy) for draft in drafts):
                wrong.append(cycle)
    return wrong, made
