"""Whole sampled generations against the exact law of the target alone.

The law of the first three tokens is computed by running the stock model after every prefix, with
mlx-lm's filters in float64. Thousands of seeded generations must follow it: chi-square, p above
1e-4 (fixed seeds).
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from draftloom import PipelineBuilder
from draftloom.contracts import DraftLaw, DraftRequest
from draftloom.pipeline import GenerateOptions
from draftloom.sampling import SamplingParams, SamplingState
from tests.support import models, pipelines
from tests.support.checkpoints import Golden, write
from tests.support.oracle import text_model
from tests.support.statistics import chi_square, filtered_law

P_VALUE = 1e-4
VOCAB, TOKENS, PROMPT = 8, 3, (1, 2, 5, 1, 2)
RUNS = 1500
SIZES: dict[str, Any] = {"hidden": models.HIDDEN, "vocab": VOCAB, "taps": (0,), "block": 4}
SEED = 9
FILTERS = [
    pytest.param({"temperature": 1.0}, id="t1"),
    pytest.param({"temperature": 0.7, "top_p": 0.85}, id="t0.7-top-p"),
]


def new(family: str, seed: int, sharp: float = 0.4) -> nn.Module:
    """A model of few layers, whose laws are broad unless `sharp`."""
    layers = {"num_hidden_layers": 2 if family.startswith("qwen3_5") else 1}
    model = models.new(models.FAMILIES[family], seed, vocab_size=VOCAB, **layers)
    text = text_model(model)
    text.lm_head.weight = text.lm_head.weight * sharp
    return model


@lru_cache(maxsize=4)
def logits_after(family: str) -> dict[tuple[int, ...], np.ndarray]:
    """Logits of the stock model after the prompt and every prefix of fewer than three tokens."""
    model, found = new(family, SEED), {}
    for length in range(TOKENS):
        every = list(itertools.product(range(VOCAB), repeat=length))
        rows = mx.array([[*PROMPT, *prefix] for prefix in every])
        found |= dict(zip(every, np.array(model(rows)[:, -1]), strict=True))
    return found


def text_law(family: str, filters: dict[str, float]) -> dict[tuple[int, ...], float]:
    after = {s: filtered_law(row, **filters) for s, row in logits_after(family).items()}
    return {
        text: float(np.prod([after[text[:i]][t] for i, t in enumerate(text)]))
        for text in itertools.product(range(VOCAB), repeat=TOKENS)
    }


DRAFTERS = ("prompt-lookup", "autoregressive", "dense", "top-k", "fixed")
CHECKPOINTS = {
    "dflash-reduced": ("speculators", Golden(draft_ids=(1, 3, 4, 6), **SIZES)),
    "dspark-reduced": (
        "speculators",
        Golden(draft_ids=(0, 2, 3, 5, 7), first_slot=0, markov="vanilla", rank=4, **SIZES),
    ),
    "dflash2": ("z-lab-new", Golden(convolution=(2, 8), selector=(4, 3), **SIZES)),
    "dflash2-reduced": (
        "speculators",
        Golden(draft_ids=(1, 3, 4, 6), convolution=(2, 8), selector=(4, 2), seed=3, **SIZES),
    ),
    "dspark-cut": ("dspark", Golden(markov="vanilla", rank=4, confidence=True, seed=2, **SIZES)),
}
"""Formats with a reduced vocabulary, and drafts that a confidence ends; random weights."""


def with_drafter(name: str, builder: PipelineBuilder, scratch: Path) -> PipelineBuilder:
    if name in CHECKPOINTS:
        form, golden = CHECKPOINTS[name]
        folder = write(scratch, form, golden)
        options = {"confidence_threshold": 0.25} if golden.confidence else {}
        use = "dspark" if golden.markov else "dflash2" if golden.dflash2 else "dflash"
        return builder.drafter(use, checkpoint=str(folder), **options)
    if name == "autoregressive":
        return builder.drafter(
            "autoregressive", model=pipelines.adapt(new("qwen2", 3, sharp=0.8))
        ).width(2)
    if name in ("dense", "top-k"):
        laws = np.random.default_rng(1).dirichlet(np.full(VOCAB, 0.5), 7)
        laws = tuple(tuple(row) for row in laws)
        return builder.drafter("test.dense", laws=laws, candidates=3 * (name == "top-k")).width(3)
    if name == "fixed":
        text = (*PROMPT, 7, 4, 0, 1, 3, 4, 0, 1, 3)
        return builder.drafter("test.fixed", text=text).width(3)
    return builder.drafter("prompt-lookup", max_ngram=2).width(3)


def generations(
    family: str, drafter: str, filters: dict[str, Any], runs: int = RUNS
) -> Iterator[tuple[tuple[int, ...], Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        builder = with_drafter(drafter, pipelines.builder(new(family, SEED)), Path(scratch))
        pipeline = builder.acceptance("speculative-sampling").build()
    with pipeline:
        for seed in range(runs):
            # One token more than is looked at, so that the last one is drafted for as well.
            options = GenerateOptions(max_tokens=TOKENS + 1, seed=seed, **filters)
            engine = pipeline.engine(PROMPT, options)
            text = tuple(t for event in engine.cycles() for t in event.token_ids)
            yield text[:TOKENS], engine.stats


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_generations_follow_the_law_of_the_target_alone(
    drafter: str, filters: dict[str, float]
) -> None:
    check("qwen3", drafter, filters)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", CHECKPOINTS)
def test_generations_with_checkpoints_follow_the_law(drafter: str) -> None:
    """q is zero outside of a reduced vocabulary; a cut ends a draft at the target's own law."""
    check("qwen3", drafter, {"temperature": 1.0})


@pytest.mark.slow
def test_generations_of_a_hybrid_follow_its_law() -> None:
    check("qwen3_5-v2", "dense", {"temperature": 1.0}, RUNS)


def check(family: str, drafter: str, filters: dict[str, float], runs: int = RUNS) -> None:
    texts, accepted, drafted = [], 0, 0
    for text, stats in generations(family, drafter, filters, runs):
        texts.append(text)
        assert not stats.fell_back
        accepted, drafted = accepted + stats.accepted, drafted + stats.drafted
    assert runs / 3 < drafted, "hardly anything was drafted"
    assert 0 < accepted < drafted, "one of the two branches was never taken"
    law = text_law(family, filters)
    assert chi_square(texts, law) > P_VALUE
    for place in range(TOKENS):
        single: dict[int, float] = dict.fromkeys(range(VOCAB), 0.0)
        for text, chance in law.items():
            single[text[place]] += chance
        assert chi_square([text[place] for text in texts], single) > P_VALUE, f"token {place}"


@pytest.mark.slow
def test_a_random_stream_in_common_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key for a cycle's draft and its acceptance: not lossless, and seen here."""
    monkeypatch.setattr(SamplingState, "draft_key", lambda self: self._accept)
    monkeypatch.setattr(SamplingState, "accept_key", _accept_key)
    texts = [text for text, _ in generations("qwen3", "autoregressive", {"temperature": 1.0})]
    assert chi_square(texts, text_law("qwen3", {"temperature": 1.0})) < P_VALUE


def _accept_key(self: SamplingState) -> mx.array:
    key = self._accept
    self._accept, _ = mx.random.split(key)
    return key


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS)
def test_an_autoregressive_drafter_draws_from_the_law_it_reports(
    filters: dict[str, float],
) -> None:
    """q is the draft model's law under the request's filters, and the tokens follow it: the texts
    above would feel a small difference too little."""
    alone = new("qwen2", 3, sharp=0.8)
    law: dict[tuple[int, ...], float] = {}
    rows = {
        prefix: filtered_law(np.array(alone(mx.array([[*PROMPT, *prefix]]))[0, -1]), **filters)
        for prefix in [(), *((t,) for t in range(VOCAB))]
    }
    for first, second in itertools.product(range(VOCAB), repeat=2):
        law[first, second] = float(rows[()][first] * rows[first,][second])
    builder = pipelines.builder(new("qwen3", SEED))
    with with_drafter("autoregressive", builder, Path()).build() as pipeline:
        request = DraftRequest((PROMPT,), SamplingState(SamplingParams(**filters)), VOCAB)
        session = pipeline._parts.drafter.open(request)
        session.observe((PROMPT[:-1],), None)
        anchor, drawn = mx.array([PROMPT[-1]], dtype=mx.int32), []
        for seed in range(RUNS):
            sampling = SamplingState(SamplingParams(seed=seed, **filters))
            draft = session.propose(anchor, 2, sampling)
            assert draft.law is DraftLaw.DENSE
            assert draft.probs is not None
            tokens = tuple(draft.tokens.tolist()[0])
            drawn.append(tokens)
            found = np.array(draft.probs)[0]
            assert np.abs(found - np.stack([rows[()], rows[tokens[:1]]])).max() < 1e-5
    assert chi_square(drawn, law) > P_VALUE


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_seed_reproduces_a_generation(drafter: str) -> None:
    runs = [
        [text for text, _ in generations("qwen3", drafter, {"temperature": 1.0}, 30)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 10, "the seed changes nothing"
