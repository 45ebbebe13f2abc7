"""Drafters stay in step with the text.

One that falls behind proposes worse and costs speed, and no test of the tokens would ever see it.
So its drafts are compared with those of the same model fresh on the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom.contracts import CacheKind, DraftRequest, TargetInfo
from draftloom.hookspecs import hookimpl
from draftloom.pipeline import GenerateOptions, Pipeline
from draftloom.plugins import PluginManager
from tests.support import cases, models
from tests.support.cases import Case
from tests.support.oracle import greedy
from tests.support.profile import examples

Proposals = list[tuple[int, list[int]]]
"""(tokens observed, anchor not counted; the draft)."""


@contextmanager
def listening(pipeline: Pipeline, heard: Proposals) -> Iterator[None]:
    """Write down every draft of a pipeline's drafter."""
    drafter: Any = pipeline._parts.drafter
    opened = drafter.open

    def open_and_listen(request: DraftRequest) -> Any:
        session, seen = opened(request), [0]
        observe, propose = session.observe, session.propose

        def observed(committed: Any, features: Any) -> None:
            seen[0] += len(committed[0])
            observe(committed, features)

        def proposed(*args: Any) -> Any:
            draft = propose(*args)
            heard.append((seen[0], draft.tokens.tolist()[0]))
            return draft

        session.observe, session.propose = observed, proposed
        return session

    drafter.open = open_and_listen
    try:
        yield
    finally:
        del drafter.open


def drafts(case: Case, folder: Path) -> tuple[Proposals, list[int]]:
    """All drafts of a generation, and how many of each were accepted."""
    heard: Proposals = []
    with cases.build(case, folder).build() as pipeline, listening(pipeline, heard):
        options = GenerateOptions(max_tokens=14, prefill_chunk=case.prefill_chunk)
        engine = pipeline.engine(case.prompt, options)
        events = list(engine.cycles())
        assert not engine.stats.fell_back
    return heard, [e.accepted for e in events if e.verified]


@pytest.mark.parametrize("detail", ["attention", "hybrid", "near"])
@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3_next", "qwen3_5_moe", "qwen3"])
def test_an_autoregressive_draft_is_the_models_own_text(
    family: str, detail: str, tmp_path: Path
) -> None:
    counts: set[int] = set()
    alone = {
        "attention": models.new(models.FAMILIES["qwen3"], 7),
        "hybrid": models.new(models.FAMILIES["qwen3_5-v2"], 7),
    }.get(detail) or cases.disturbed(family, 0.1)

    @examples(3, family, detail)
    @given(
        st.integers(2, 7),
        st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=6).map(tuple),
        st.sampled_from((1, 2048)),
    )
    def check(block_size: int, prompt: tuple[int, ...], chunk: int) -> None:
        case = Case(
            family, f"autoregressive-{detail}", "auto", "block", block_size, prompt, 0, chunk
        )
        heard, accepted = drafts(case, tmp_path)
        assert heard
        counts.update(accepted)
        for seen, draft in heard:
            text = case.trace.tokens[: seen + 1]
            assert draft == greedy(alone, text, block_size - 1), f"after {seen} tokens"

    check()
    if detail == "near":
        assert len(counts) > 1, "drafts were always right, or always wrong"


class SnapshotsForAll:
    """A plugin that has every cache rolled back by running tokens again."""

    @hookimpl
    def resolve_cache_rollback(self, cache_kind: CacheKind, target: TargetInfo) -> str:
        return "snapshot"


def test_a_draft_model_that_runs_tokens_again_runs_the_right_ones(tmp_path: Path) -> None:
    """Some draft models have caches that only a snapshot takes back."""
    family = "qwen3_5-v2"
    case = Case(family, "autoregressive-near", "auto", "block", 6, (1, 2, 3, 4))
    builder = cases.build(case, tmp_path)
    builder.plugins = PluginManager(entry_points=False, extra=[SnapshotsForAll()])
    heard: Proposals = []
    with builder.build() as pipeline, listening(pipeline, heard):
        assert pipeline.names["rollback"] == "snapshot"
        events = list(pipeline.engine(case.prompt, GenerateOptions(max_tokens=14)).cycles())
    assert any(0 < e.accepted < e.verified for e in events)
    alone = cases.disturbed(family, 0.1)
    for seen, draft in heard:
        text = case.trace.tokens[: seen + 1]
        assert draft == greedy(alone, text, case.block_size - 1), f"after {seen} tokens"


@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
def test_prompt_lookup_copies_what_followed_the_last_time(family: str, tmp_path: Path) -> None:
    case = Case(family, "prompt-lookup", "auto", "block", 7, (1, 2, 3, 1, 2, 3, 1))
    heard, _ = drafts(case, tmp_path)
    found = 0
    for seen, draft in heard:
        text = list(case.trace.tokens[: seen + 1])
        assert draft == looked_up(text, 6), f"after {text}"
        found += bool(draft)
    assert found > 3


def looked_up(text: list[int], width: int) -> list[int]:
    """What followed the last earlier place that ends like the text, for 3, 2, then 1 tokens; the
    last token of the text itself follows nothing yet."""
    for size in (3, 2, 1):
        for end in range(len(text) - 2, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                grown = list(text)
                while len(grown) < len(text) + width:
                    grown.append(grown[len(grown) - len(text) + end])
                return grown[len(text) :]
    return []
