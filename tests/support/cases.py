"""One generation of a drawn pipeline, looked at after every cycle."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from draftloom import PipelineBuilder
from draftloom.contracts import TargetAdapter
from draftloom.events import CycleEvent
from draftloom.pipeline import GenerateOptions
from tests.support import models, pipelines
from tests.support.checkpoints import Golden, write
from tests.support.drafters import ScriptedDrafter
from tests.support.oracle import Trace, greedy_trace

__all__ = [
    "DRAFTERS",
    "KERNELS",
    "ROLLBACKS",
    "TAPS",
    "VERIFIERS",
    "Case",
    "build",
    "disturbed",
    "draft_model",
    "rollbacks_for",
    "run",
]

TAPS = (0, 2)
NEW_TOKENS = 18
DRAFTERS = (
    "none",
    "prompt-lookup",
    "autoregressive-attention",
    "autoregressive-hybrid",
    "autoregressive-near",
    "autoregressive-itself",
    "dflash",
    "dspark",
    "cascade",
    "scripted-right",
    "scripted-wrong",
    "scripted-half",
    "scripted-mixed",
)
ROLLBACKS: dict[str, Any] = {
    "auto": "auto",
    "snapshot": "snapshot",
    "replay+snapshot": {"gated-delta": "tape-replay", "attention": "snapshot"},
    "snapshot+trim": {"gated-delta": "snapshot", "attention": "trim"},
    "deferred": "auto",
}
KERNELS = {"deferred": {"replay-verify": "on"}}
"""Choices of kernels that go with a rollback."""
VERIFIERS = ("block", "sequential")


def rollbacks_for(family: str) -> tuple[str, ...]:
    """The rollbacks that differ for a family: mixtures need two kinds of caches."""
    hybrid = any(family == f.name for f in models.HYBRID)
    return tuple(ROLLBACKS) if hybrid else ("auto", "snapshot")


@attrs.frozen
class Case:
    """What a generation is made of.

    Attributes:
        family, drafter, rollback, verifier: names.
        block_size: 1..16, counts the anchor.
        prompt: token ids.
        seed: of the corruptions.
        prefill_chunk: prompt tokens at once.
        kernels: (operation, choice), on top of those that go with the rollback.
    """

    family: str
    drafter: str
    rollback: str
    verifier: str
    block_size: int
    prompt: tuple[int, ...]
    seed: int = 0
    prefill_chunk: int = 2048
    kernels: tuple[tuple[str, str], ...] = ()

    @property
    def trace(self) -> Trace:
        """Plain mlx-lm on the same prompt; goes on past the end, for drafts that do."""
        return greedy_trace(self.family, self.prompt, NEW_TOKENS + 16)


@lru_cache(maxsize=64)
def draft_model(family: str, detail: str) -> TargetAdapter:
    """A model to draft for a family: some other one, a disturbed copy (``near``), or a copy."""
    if detail == "attention":
        return pipelines.adapt(models.new(models.FAMILIES["qwen3"], 7))
    if detail == "hybrid":
        return pipelines.adapt(models.new(models.FAMILIES["qwen3_5-v2"], 7))
    return pipelines.adapt(disturbed(family, 0.1 if detail == "near" else 0.0))


def disturbed(family: str, noise: float) -> nn.Module:
    """The model of a family with noise on its weights, relative to their size."""
    model = models.new(models.FAMILIES[family])
    rng = np.random.default_rng(77)
    model.update(
        tree_map(
            lambda w: w * mx.array(1 + noise * rng.standard_normal(w.shape).astype(np.float32)),
            model.parameters(),
        )
    )
    return model


def _with_drafter(case: Case, builder: PipelineBuilder, folder: Path) -> PipelineBuilder:
    name, _, detail = case.drafter.partition("-")
    if name == "scripted":
        return builder.drafter(
            "test.scripted", text=case.trace.tokens, vocab_size=models.VOCAB, mode=detail,
            seed=case.seed, taps=TAPS,
        )  # fmt: skip
    if name == "autoregressive":
        return builder.drafter("autoregressive", model=draft_model(case.family, detail))
    if name == "dspark":
        return builder.drafter(
            "dspark", checkpoint=_spark(folder / "dspark"), confidence_threshold=0.05
        )
    checkpoint = folder / "dflash"
    if not checkpoint.is_dir():
        pipelines.dflash_checkpoint(
            checkpoint, hidden=models.HIDDEN, vocab=models.VOCAB, taps=TAPS, block_size=16
        )
    if name == "dflash":
        return builder.drafter("dflash", checkpoint=str(checkpoint))
    if name == "cascade":
        lookup = {"use": "prompt-lookup", "max_ngram": 2}
        stages = [lookup, {"use": "dflash", "checkpoint": str(checkpoint)}]
        return builder.drafter("cascade", stages=stages)
    return builder.drafter(case.drafter)


def _spark(checkpoint: Path) -> str:
    """A random DSpark checkpoint that can propose every third token."""
    if not checkpoint.is_dir():
        golden = Golden(
            hidden=models.HIDDEN, vocab=models.VOCAB, taps=TAPS, block=16, first_slot=0,
            draft_ids=tuple(range(1, models.VOCAB, 3)), markov="gated", confidence=True,
        )  # fmt: skip
        write(checkpoint, "speculators", golden)
    return str(checkpoint)


def build(case: Case, folder: Path, tokenizer: Any = None) -> PipelineBuilder:
    """The pipeline of a case, to be built.

    Args:
        case: which.
        folder: where the random DFlash checkpoint lies or is made.
        tokenizer: an object with `eos_token_ids`, or None.
    """
    builder = pipelines.builder(models.build(case.family), tokenizer)
    builder = _with_drafter(case, builder, folder)
    return (
        builder.rollback(ROLLBACKS[case.rollback])
        .kernels({**KERNELS.get(case.rollback, {}), **dict(case.kernels)})
        .verifier(case.verifier)
        .block_size(case.block_size)
    )


def run(case: Case, folder: Path) -> int:
    """Generate, and check after every cycle that

    - the tokens are those of plain mlx-lm,
    - the caches are those of a fresh prefill of all tokens but the last, bit for bit,
    - the drafter has been shown exactly these tokens and the target's features of them,
    - as many draft tokens were accepted as the text agrees with.

    Returns:
        Cycles run, the prompt's own not counted.
    """
    trace, start = case.trace, len(case.prompt)
    with build(case, folder).build() as pipeline:
        options = GenerateOptions(max_tokens=NEW_TOKENS, prefill_chunk=case.prefill_chunk)
        engine = pipeline.engine(case.prompt, options)
        drafter: Any = pipeline._parts.drafter
        count, cycles, agreeing = start, 0, None
        for event in engine.cycles():
            emitted = trace.tokens[count : count + len(event.token_ids)]
            assert event.token_ids == emitted, f"{case}, cycle {event.index}"
            count += len(event.token_ids)
            cycles += event.index > 0
            different = trace.differences(engine.cache, count - 1)
            assert not different, f"{case}, cycle {event.index}: {different}"
            _check_acceptance(case, event, agreeing)
            if isinstance(drafter, ScriptedDrafter) and event.finish_reason is None:
                _check_shown(drafter, trace, count - 1)
                agreeing = drafter.session.agreeing if drafter.session else None
        assert not engine.stats.fell_back, engine.stats.fell_back
        assert count - start == NEW_TOKENS
        _check_use(case, engine.stats.drafted)
    return cycles


def _check_acceptance(case: Case, event: CycleEvent, agreeing: int | None) -> None:
    assert 0 <= event.accepted <= event.verified < case.block_size
    if case.drafter == "autoregressive-itself":
        assert event.accepted == event.verified, f"{case}: the model disagrees with itself"
    if case.drafter.startswith("scripted") and event.verified:
        assert agreeing is not None
        assert event.accepted == min(agreeing, event.verified), f"{case}, cycle {event.index}"
    if event.finish_reason is None and event.index:
        assert len(event.token_ids) == event.accepted + 1


def _check_shown(drafter: ScriptedDrafter, trace: Trace, count: int) -> None:
    session = drafter.session
    assert session is not None
    assert session.seen == list(trace.tokens[:count])
    shown = np.concatenate([np.array(f)[0] for f in session.features]) if session.features else None
    assert shown is not None
    assert np.array_equal(shown, trace.taps(TAPS, count)), "features are not the layers' outputs"


def _check_use(case: Case, drafted: int) -> None:
    """That the drafter did its work: the rest says nothing about one that never proposes."""
    proposes = (
        "autoregressive",
        "dflash",
        "dspark",
        "scripted-right",
        "scripted-wrong",
        "scripted-half",
    )
    if case.block_size > 1 and case.drafter.startswith(proposes):
        assert drafted > 0, f"{case}: nothing was drafted"
    if case.block_size == 1 or case.drafter == "none":
        assert drafted == 0
