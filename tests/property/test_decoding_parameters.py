"""Decoding parameters with speculation equal the same without it, and mlx-lm's own, bit for bit.

The reference is `mlx_lm.generate.generate_step` on the stock model with mlx-lm's own processors:
tokens, and the log-probabilities of every position. float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from draftloom import GenerateOptions, GenerationError, PipelineBuilder
from tests.support import cases, models, pipelines
from tests.support.cases import Case
from tests.support.checkpoints import Golden, write

TOKENS = 24
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1, 5)
FAMILIES = ("qwen3_5-v2", "qwen3")
DRAFTERS = (
    "none",
    "prompt-lookup",
    "autoregressive-near",
    "autoregressive-itself",
    "dflash",
    "dflash2",
    "dspark",
    "cascade",
    "fixed-right",
    "fixed-half",
)
BLOCK: dict[str, dict[str, Any]] = {
    "dflash2": {"convolution": (3, 8)},
    "dspark": {"markov": "vanilla", "confidence": True},
}
LOSSLESS = ("auto", "greedy", "speculative-sampling", "block-verification")


class States:
    """A grammar-like mask: which tokens may come depends on a state, which depends on all tokens
    so far. Every token moves it; two of three tokens are forbidden in each state."""

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        history: Any = tokens.tolist()
        state = 0
        for token in history:
            state = (2 * state + token) % 7
        allowed = mx.arange(logits.shape[-1]) % 3 == state % 3
        return mx.where(allowed, logits, -mx.inf)


class Strict(States):
    """The same, but it raises on tokens that it would not have let pass, as parsers do."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        history: Any = tokens.tolist()
        state = 0
        for place, token in enumerate(history):
            if place >= self._start and token % 3 != state % 3:
                raise ValueError(f"token {token} cannot follow")
            state = (2 * state + token) % 7
        return super().__call__(tokens, logits)


PARAMETERS: dict[str, dict[str, Any]] = {
    "penalties": {
        "repetition_penalty": 1.4,
        "repetition_context_size": 9,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "frequency_context_size": 5,
    },
    "whole-text": {
        "repetition_penalty": 1.1,
        "repetition_context_size": 0,
        "frequency_penalty": 0.15,
        "frequency_context_size": 0,
    },
    "bias": {"logit_bias": {7: -100.0, 3: 2.5, 11: float("-inf")}},
    "grammar": {"logits_processors": (States(),)},
    "strict-grammar": {"logits_processors": (Strict(len(PROMPT)),)},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "logit_bias": {5: 1.5},
        "logits_processors": (*make_logits_processors(frequency_penalty=0.3), States()),
    },
    "none": {},
}


@lru_cache(maxsize=64)
def reference(family: str, name: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Tokens and log-probabilities [n, V] of plain mlx-lm."""
    given = dict(PARAMETERS[name])
    own = given.pop("logits_processors", ())
    return by_mlx_lm(family, PROMPT, [*make_logits_processors(**given), *own], TOKENS)


def by_mlx_lm(
    family: str, prompt: tuple[int, ...], processors: Any, count: int
) -> tuple[tuple[int, ...], np.ndarray]:
    stream = mx.default_stream(mx.cpu)
    steps = generate_step(
        mx.array(list(prompt)),
        models.stock(family),
        max_tokens=count,
        logits_processors=processors,
        stream=stream,
    )
    tokens, rows = zip(*((int(token), np.array(row)) for token, row in steps), strict=True)
    return tokens, np.stack(rows)


def builder_of(family: str, drafter: str, name: str, folder: Path) -> PipelineBuilder:
    if drafter.startswith("fixed"):
        text = np.array([*PROMPT, *reference(family, name)[0]])
        if drafter == "fixed-half":
            text[len(PROMPT) + 2 :: 3] = (text[len(PROMPT) + 2 :: 3] + 1) % models.VOCAB
        made = pipelines.builder(models.build(family))
        return made.drafter("test.fixed", text=tuple(text.tolist())).width(5)
    if drafter in BLOCK:
        golden = Golden(hidden=models.HIDDEN, vocab=models.VOCAB, taps=cases.TAPS, **BLOCK[drafter])
        form = "speculators" if drafter == "dspark" else "z-lab-new"
        checkpoint = write(folder / drafter, form, golden)
        made = pipelines.builder(models.build(family))
        return made.drafter(drafter, checkpoint=str(checkpoint)).width(4)
    case = Case(family, drafter, "auto", "block", 5, PROMPT)
    return cases.build(case, folder)


def check(
    build: Callable[[], PipelineBuilder], family: str, name: str, **more: Any
) -> tuple[int, int]:
    """Generate and compare; returns (accepted, verified) draft tokens."""
    tokens, rows = reference(family, name)
    with build().build() as pipeline:
        options = GenerateOptions(
            max_tokens=TOKENS, logprobs=True, top_logprobs=4, **PARAMETERS[name], **more
        )
        engine = pipeline.engine(PROMPT, options)
        events = list(engine.cycles())
    found = tuple(token for event in events for token in event.token_ids)
    assert found == tokens
    assert not engine.stats.fell_back, engine.stats.fell_back
    records = [record for event in events for record in event.logprobs]
    assert [record.token_id for record in records] == list(tokens)
    for record, row in zip(records, rows, strict=True):
        assert record.logprob == row[record.token_id]
        best = np.sort(row[np.isfinite(row)])[::-1][:4]
        assert [value for _, value in record.top] == best.tolist()
        assert all(row[token] == value for token, value in record.top)
        assert record.top[0][0] == record.token_id, "greedy takes the best"
    return engine.stats.accepted, engine.stats.verified


def every_pair() -> list[Any]:
    """All drafters with all parameters; the quick ones are those that show most."""
    pairs = []
    for drafter in DRAFTERS:
        for name in PARAMETERS:
            quick = drafter == "fixed-half" or name in ("all", "strict-grammar")
            marks = () if quick else (pytest.mark.slow,)
            pairs.append(pytest.param(drafter, name, marks=marks, id=f"{drafter}-{name}"))
    return pairs


@pytest.mark.parametrize(("drafter", "name"), every_pair())
def test_every_drafter_gives_what_plain_mlx_lm_gives(
    drafter: str, name: str, tmp_path: Path
) -> None:
    family = FAMILIES[0]
    accepted, verified = check(lambda: builder_of(family, drafter, name, tmp_path), family, name)
    if drafter.startswith("fixed"):
        assert accepted >= TOKENS // 3, "the rows after the first one were hardly ever used"
        assert (accepted == verified) == (drafter == "fixed-right")
    if drafter == "none":
        assert verified == 0


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("policy", LOSSLESS)
@pytest.mark.parametrize(
    "drafter", ["fixed-half", pytest.param("autoregressive-near", marks=pytest.mark.slow)]
)
def test_every_lossless_policy_gives_the_same(
    drafter: str, policy: str, name: str, tmp_path: Path
) -> None:
    family = FAMILIES[1]
    check(lambda: builder_of(family, drafter, name, tmp_path).acceptance(policy), family, name)


@pytest.mark.parametrize("verifier", ["block", "sequential"])
@pytest.mark.parametrize("rollback", ["auto", "snapshot"])
def test_every_verifier_and_rollback_gives_the_same(
    verifier: str, rollback: str, tmp_path: Path
) -> None:
    family = FAMILIES[0]
    check(
        lambda: (
            builder_of(family, "fixed-half", "all", tmp_path).verifier(verifier).rollback(rollback)
        ),
        family,
        "all",
    )


def test_a_pipeline_file_and_the_builder_set_defaults_that_a_request_overrides(
    tmp_path: Path,
) -> None:
    family, name = FAMILIES[1], "penalties"
    tokens, _ = reference(family, name)
    builder = builder_of(family, "prompt-lookup", name, tmp_path).sampling(**PARAMETERS[name])
    again = attrs.evolve(builder.spec, drafter=builder.spec.drafter)
    read = type(again).from_toml(again.to_toml())
    assert read.sampling == builder.spec.sampling
    with builder.build() as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=TOKENS).token_ids == tokens
        off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        plain = pipeline.generate(PROMPT, max_tokens=TOKENS, **off).token_ids
    assert plain == reference(family, "none")[0] != tokens


@settings(max_examples=12, deadline=None)
@given(
    prompt=st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=10),
    corrupt=st.integers(1, 6),
    width=st.integers(1, 7),
    repetition=st.sampled_from([1.0, 1.3]),
    size=st.sampled_from([0, 1, 4, 30]),
    presence=st.sampled_from([0.0, 0.8, -0.5]),
    frequency=st.sampled_from([0.0, 0.4]),
    grammar=st.booleans(),
)
def test_any_history(
    prompt: list[int],
    corrupt: int,
    width: int,
    repetition: float,
    size: int,
    presence: float,
    frequency: float,
    grammar: bool,
) -> None:
    given = {
        "repetition_penalty": repetition,
        "repetition_context_size": size,
        "presence_penalty": presence,
        "presence_context_size": size,
        "frequency_penalty": frequency,
    }
    own = [States()] if grammar else []
    processors = [*make_logits_processors(**given), *own]
    tokens, _ = by_mlx_lm("qwen3", tuple(prompt), processors, 12)
    text = np.array([*prompt, *tokens])
    text[len(prompt) + corrupt :: corrupt] = (text[len(prompt) + corrupt :: corrupt] + 1) % 5
    builder = pipelines.builder(models.build("qwen3"))
    builder = builder.drafter("test.fixed", text=tuple(text.tolist())).width(width)
    with builder.build() as pipeline:
        options = GenerateOptions(max_tokens=12, logits_processors=own, **given)
        events = list(pipeline.engine(tuple(prompt), options).cycles())
    assert tuple(token for event in events for token in event.token_ids) == tokens


def test_a_processor_may_fail_past_the_end_of_the_text(tmp_path: Path) -> None:
    """The draft goes on behind the end-of-sequence token, where a grammar has no state."""
    tokens, _ = reference("qwen3", "none")
    end = tokens[4]
    first = tokens.index(end)

    def ends(history: mx.array, logits: mx.array) -> mx.array:
        text: Any = history.tolist()
        if end in text[len(PROMPT) :]:
            raise ValueError("the text has ended")
        return logits

    builder = builder_of("qwen3", "fixed-right", "none", tmp_path)
    tokenizer = SimpleNamespace(eos_token_ids={end})
    for build in (builder.model(models.build("qwen3"), tokenizer), builder):
        with build.build() as pipeline:
            engine = pipeline.engine(PROMPT, GenerateOptions(logits_processors=[ends]))
            if build is builder:  # nothing ends the text: now the row after it is used
                with pytest.raises(GenerationError, match="the text has ended"):
                    list(engine.cycles())
                continue
            events = list(engine.cycles())
        found = tuple(token for event in events for token in event.token_ids)
        assert found == tokens[: first + 1]
        assert events[-1].finish_reason == "stop"
        assert engine.stats.verified > engine.stats.committed - engine.stats.cycles


def test_a_processor_that_fails_ends_the_text_where_plain_decoding_would(tmp_path: Path) -> None:
    tokens, _ = reference("qwen3", "none")

    def failing(history: mx.array, logits: mx.array) -> mx.array:
        if history.size >= len(PROMPT) + 7:
            raise ValueError("no such state")
        return logits

    builder = builder_of("qwen3", "fixed-half", "none", tmp_path)
    with builder.build() as pipeline:
        engine = pipeline.engine(PROMPT, GenerateOptions(logits_processors=[failing]))
        with pytest.raises(GenerationError, match=r"failing.* failed: no such state") as caught:
            list(engine.cycles())
    emitted = caught.value.token_ids
    assert emitted == tokens[: len(emitted)]
    # Plain decoding would have written 7. The cycle that runs into the failure is taken back whole.
    assert 7 - 5 <= len(emitted) <= 7
