"""Whole sampled generations under every decoding parameter at once, against their exact law.

The law of the first three tokens, or of fewer where a text ends: logits of the stock model after
every prefix, mlx-lm's own processors on them with the whole history, then the filters in float64
with XTC as a mixture. Hundreds of seeded generations must follow it, for every drafter and both
lossless policies: chi-square, p above 1e-4 (fixed seeds).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from draftloom.pipeline import GenerateOptions
from draftloom.processing import LogitsProcessing
from tests.support import pipelines
from tests.support.statistics import chi_square, filtered_law

from .test_acceptance_generations import (
    DRAFTERS,
    P_VALUE,
    PROMPT,
    SEED,
    TOKENS,
    logits_after,
    new,
    with_drafter,
)

END = 6
RUNS = 600
DRAWN = ("autoregressive", "dense", "top-k", "dflash2", "dspark-cut")
FILTERS = {
    "temperature": 1.1,
    "top_p": 0.97,
    "min_p": 0.02,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.15,
    "xtc_special_tokens": (END,),
    "top_k": 6,
}
PENALTIES = {
    "repetition_penalty": 1.5,
    "repetition_context_size": 3,
    "presence_penalty": 0.7,
    "presence_context_size": 0,
    "frequency_penalty": 0.5,
    "frequency_context_size": 4,
    "logit_bias": {2: 0.8, 7: -0.5},
}


def never_twice(tokens: mx.array, logits: mx.array) -> mx.array:
    """No token may follow itself."""
    return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], -mx.inf, logits)


def row_law(prefix: tuple[int, ...], logits: np.ndarray) -> np.ndarray:
    row = mx.array(logits)[None]
    for processor in (*make_logits_processors(**PENALTIES), never_twice):
        row = processor(mx.array([*PROMPT, *prefix]), row)
    with np.errstate(divide="ignore"):
        return filtered_law(np.array(row)[0], **FILTERS)  # type: ignore[arg-type]


@lru_cache(maxsize=2)
def text_law(family: str) -> dict[tuple[int, ...], float]:
    rows = {s: row_law(s, row) for s, row in logits_after(family).items()}
    law: dict[tuple[int, ...], float] = {}
    open_texts: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_texts:
        text, chance = open_texts.pop()
        for token, share in enumerate(rows[text]):
            longer = (*text, token)
            if token == END or len(longer) == TOKENS:
                law[longer] = chance * share
            else:
                open_texts.append((longer, chance * share))
    return law


def texts_of(
    drafter: str, policy: str, runs: int, width: int | None = None
) -> tuple[list[tuple[int, ...]], int, int]:
    """Texts cut at three tokens, draft tokens accepted and verified."""
    tokenizer = SimpleNamespace(eos_token_ids={END})
    found, accepted, verified = [], 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        builder = pipelines.builder(new("qwen3", SEED), tokenizer)
        builder = with_drafter(drafter, builder, Path(scratch)).acceptance(policy)
        pipeline = (builder if width is None else builder.width(width)).build()
    with pipeline:
        for seed in range(runs):
            options = GenerateOptions(
                max_tokens=TOKENS + 1,
                seed=seed,
                logits_processors=[never_twice],
                **FILTERS,  # type: ignore[arg-type]
                **PENALTIES,  # type: ignore[arg-type]
            )
            engine = pipeline.engine(PROMPT, options)
            text = tuple(token for event in engine.cycles() for token in event.token_ids)
            found.append(text[:TOKENS])
            assert not engine.stats.fell_back
            accepted += engine.stats.accepted
            verified += engine.stats.verified
    return found, accepted, verified


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafter", "policy"),
    [
        *((drafter, "speculative-sampling") for drafter in (*DRAFTERS, "none")),
        # Of chosen tokens it is the same rule.
        *((drafter, "block-verification") for drafter in DRAWN),
    ],
)
def test_generations_follow_the_law_of_the_parameters(drafter: str, policy: str) -> None:
    found, accepted, verified = texts_of(drafter, policy, RUNS)
    law = text_law("qwen3")
    assert abs(sum(law.values()) - 1) < 1e-9
    assert any(text[-1] == END and len(text) < TOKENS for text in found), "no text ended"
    if drafter != "none":
        assert 0 < accepted < verified, "one of the two branches was never taken"
    assert chi_square(found, law) > P_VALUE


@pytest.mark.slow
def test_one_draft_token_a_cycle() -> None:
    found, accepted, verified = texts_of("dense", "block-verification", RUNS, width=1)
    assert 0 < accepted < verified
    assert chi_square(found, text_law("qwen3")) > P_VALUE


class _FirstRowOnly(LogitsProcessing):
    """Processes every row by the history of the first: what a peer did."""

    def __call__(self, block: mx.array, logits: mx.array) -> mx.array:
        rows = [super(_FirstRowOnly, self).__call__(block[:, :1], row[:, None])
                for row in (logits[:, i] for i in range(logits.shape[1]))]  # fmt: skip
        return mx.concatenate(rows, axis=1)

    @property
    def dead(self) -> mx.array | None:
        return None


@pytest.mark.slow
def test_a_history_without_the_draft_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftloom.engine.LogitsProcessing", _FirstRowOnly)
    found, _, _ = texts_of("fixed", "speculative-sampling", RUNS)
    assert chi_square(found, text_law("qwen3")) < 1e-6


@pytest.mark.parametrize("policy", ["speculative-sampling", "block-verification"])
@pytest.mark.parametrize("drafter", ["dense", "fixed"])
def test_a_seed_reproduces(drafter: str, policy: str) -> None:
    runs = [texts_of(drafter, policy, 12)[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 4
    law: Callable[[tuple[int, ...]], float] = text_law("qwen3").__getitem__
    assert all(law(text) > 0 for text in runs[0]), "a text that the parameters forbid"


def test_the_parameters_matter() -> None:
    """That the law is not nearly the plain one: the chi-square would not notice."""
    plain: Any = {s: filtered_law(row, 1.0) for s, row in logits_after("qwen3").items()}
    ours = row_law((), logits_after("qwen3")[()])
    assert np.abs(ours - plain[()]).sum() > 0.3
