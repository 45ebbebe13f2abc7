"""Drafts that end before their last slot: the output's law is the target's.

Exact enumeration first: with a cut that is known before a token is drawn the rule gives the
target's law to 1e-12, with one that looks at the token itself it does not. Then the policies
against the rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from draftloom import PipelineBuilder, Width
from draftloom.contracts import ComponentInfo, Draft
from draftloom.drafting import GuardedDrafter
from draftloom.errors import DrafterFallbackWarning
from draftloom.events import GenerationStats
from draftloom.verifiers.acceptance.greedy import GreedyAcceptance
from draftloom.verifiers.acceptance.speculative_sampling import SpeculativeSampling
from tests.support.statistics import chi_square
from tests.unit.fakes import PROMPT, Offer, model, plain, plugins
from tests.unit.test_acceptance import (
    P_VALUE,
    ROWS,
    Tables,
    batch,
    emissions,
    full_text_law,
    state,
    tables,
)

Stop = Callable[[tuple[int, ...]], bool]
FILTERS = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}]


def before(prefix: tuple[int, ...]) -> bool:
    """Whether a draft ends after these tokens: decided by them."""
    return bool(prefix) and (len(prefix) + sum(prefix)) % 3 != 0


def cut_law(p: dict[Any, Any], q: dict[Any, Any], width: int, ends: Stop) -> dict[Any, float]:
    """Probability of every (accepted tokens.., next token) with drafts that end where `ends` says:
    p is drawn from there, as after a whole draft."""
    law: dict[Any, float] = {}
    reached = {(): 1.0}
    for length in range(width + 1):
        deeper: dict[Any, float] = {}
        for prefix, chance in reached.items():
            if length == width or ends(prefix):
                for token, share in enumerate(p[prefix]):
                    law[(*prefix, token)] = law.get((*prefix, token), 0.0) + chance * share
                continue
            rejected = 0.0
            for token, proposed in enumerate(q[prefix]):
                accept = min(1.0, p[prefix][token] / proposed) if proposed > 0 else 0.0
                deeper[(*prefix, token)] = chance * proposed * accept
                rejected += chance * proposed * (1 - accept)
            left = np.maximum(p[prefix] - q[prefix], 0)
            if rejected > 0:
                for token, share in enumerate(left / left.sum()):
                    law[(*prefix, token)] = law.get((*prefix, token), 0.0) + rejected * share
        reached = {s: c for s, c in deeper.items() if c > 0}
    return law


def looking_law(p: dict[Any, Any], q: dict[Any, Any]) -> dict[Any, float]:
    """K = 1 and a cut that looks at the drafted token: token 0 is never kept in the draft."""
    law: dict[Any, float] = {}
    for token, proposed in enumerate(q[()]):
        accept = min(1.0, p[()][token] / proposed) if proposed > 0 else 0.0
        if token == 0:
            for other, share in enumerate(p[()]):
                law[(other,)] = law.get((other,), 0.0) + proposed * share
            continue
        law[(token,)] = law.get((token,), 0.0) + proposed * accept
        left = np.maximum(p[()] - q[()], 0)
        for other, share in enumerate(left / left.sum()):
            law[(other,)] = law.get((other,), 0.0) + proposed * (1 - accept) * share
    return law


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("vocab", "width"), [(3, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("law", ["dense", "top-k", "deterministic"])
def test_a_cut_known_before_the_token_keeps_the_targets_law(
    law: str, vocab: int, width: int, filters: dict[str, Any]
) -> None:
    given = tables(law, vocab, width, seed=vocab + width)
    p = given.p(filters)
    emitted = cut_law(p, given.q, width, before)
    assert abs(sum(emitted.values()) - 1) < 1e-12
    found = full_text_law(emitted, p, width)
    for text in itertools.product(range(vocab), repeat=width + 1):
        exact = np.prod([p[text[:i]][t] for i, t in enumerate(text)])
        assert abs(found.get(text, 0.0) - exact) < 1e-12


def test_a_cut_that_looks_at_the_token_does_not() -> None:
    given = tables("dense", 4, 1, seed=5)
    p = given.p({"temperature": 1.0})
    found = looking_law(p, given.q)
    assert abs(sum(found.values()) - 1) < 1e-12
    assert max(abs(found[(t,)] - p[()][t]) for t in range(4)) > 1e-3


def cut_batch(given: Tables, law: str, key: mx.array) -> tuple[Draft, mx.array]:
    draft, logits = batch(given, law, ROWS, key)
    lengths = []
    for row in draft.tokens.tolist():
        ends = (i for i in range(given.width) if before(tuple(row[:i])))
        lengths.append(next(ends, given.width))
    assert min(lengths) < given.width, "no draft ends early"
    return Draft(
        draft.tokens, draft.law, draft.probs, draft.candidates, lengths=mx.array(lengths)
    ), logits


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("vocab", "width"), [(4, 2), (4, 3)])
@pytest.mark.parametrize("law", ["dense", "top-k", "deterministic"])
def test_speculative_sampling_follows_the_rule(
    law: str, vocab: int, width: int, filters: dict[str, Any]
) -> None:
    given = tables(law, vocab, width, seed=vocab + width)
    sampling = state(3, **filters)
    draft, logits = cut_batch(given, law, sampling.draft_key())
    counts, following = SpeculativeSampling().accept(draft, logits, sampling)
    found = emissions(draft, counts, following)
    p = given.p(filters)
    assert chi_square(found, cut_law(p, given.q, width, before)) > P_VALUE
    assert chi_square([e[0] for e in found], dict(enumerate(p[()]))) > P_VALUE
    assert (counts <= draft.lengths).all().item()
    assert (counts == draft.lengths).any().item()
    whole = emissions(
        draft,
        *SpeculativeSampling().accept(
            Draft(draft.tokens, draft.law, draft.probs, draft.candidates), logits, sampling
        ),
    )
    assert whole != found, "the cut changes nothing"


@pytest.mark.parametrize("policy", [GreedyAcceptance(), SpeculativeSampling()])
def test_greedy_ends_at_the_cut_with_the_targets_own_token(policy: Any) -> None:
    best = mx.array([[3, 1, 2, 0]] * 5)
    logits = (mx.arange(4) == best[..., None]).astype(mx.float32)
    draft = Draft(best[:, :3], lengths=mx.array([0, 1, 2, 3, 9]))
    counts, following = policy.accept(draft, logits, state())
    assert counts.tolist() == [0, 1, 2, 3, 3]
    assert following.tolist() == [3, 1, 2, 0, 0]


def test_lengths_of_a_draft_cut_shorter_and_of_a_whole_one() -> None:
    draft = Draft(mx.zeros((2, 4), mx.int32), lengths=mx.array([1, 4]))
    assert draft.stands().tolist() == [[True, False, False, False], [True] * 4]
    assert draft.first(2).stands().tolist() == [[True, False], [True, True]]
    assert Draft(mx.zeros((1, 2), mx.int32)).stands().tolist() == [[True, True]]


def test_lengths_of_a_wrong_shape_give_the_drafter_up() -> None:
    class Wrong:
        info = ComponentInfo("wrong")

        def open(self, request: Any) -> Any:
            return self

        def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
            return Draft(mx.zeros((1, 2), mx.int32), lengths=mx.array([1, 2]))

    stats = GenerationStats()
    guarded = GuardedDrafter(Wrong(), 8, stats)  # type: ignore[arg-type]
    guarded.open(None)  # type: ignore[arg-type]
    with pytest.warns(DrafterFallbackWarning, match=r"lengths is \(2,\)"):
        draft = guarded.propose(mx.array([1]), 2, 2, state())
    assert draft.width == 0


@pytest.mark.parametrize(("below", "looked_at"), [(8, False), (9, True), (None, True)])
def test_ids_that_cannot_be_outside_are_not_looked_at(below: int | None, looked_at: bool) -> None:
    """Looking is five launches a cycle on a GPU."""
    tokens = mx.array([[1, 2]], dtype=mx.int32)

    class Bounded:
        info = ComponentInfo("bounded")

        def open(self, request: Any) -> Any:
            return self

        def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
            return Draft(tokens, ids_below=below)

    guarded = GuardedDrafter(Bounded(), 8, GenerationStats())  # type: ignore[arg-type]
    guarded.open(None)  # type: ignore[arg-type]
    draft = guarded.propose(mx.array([1]), 2, 2, state())
    assert draft.source == "bounded"
    assert (draft.tokens is not tokens) == looked_at
    assert (draft.healthy is not None) == looked_at
    assert draft.tokens.tolist() == [[1, 2]]


def test_the_engine_counts_what_the_drafter_stood_by() -> None:
    """Right drafts that end after one token: each is accepted, what lies past was not refused. The
    width policy is told how wide the pass was: that is what the time was spent on."""
    text = plain(model(), PROMPT, 11)

    class Hesitant:
        info = ComponentInfo("hesitant", default_width=3, max_width=3)

        def open(self, request: Any) -> Any:
            return self

        def observe(self, committed: Any, features: Any) -> None:
            self.seen = getattr(self, "seen", 0) + len(committed[0])

        def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
            start = self.seen - len(PROMPT) + 1
            tokens = [*text[start : start + width], *[0] * width][:width]
            return Draft(mx.array([tokens], mx.int32), lengths=mx.array([1]))

    widths: list[tuple[int, ...]] = []

    class Watching:
        info = ComponentInfo("watching")

        def choose(self, limit: int) -> Width:
            return Width(3, 3)

        def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
            widths.append((drafted, verified, accepted))

    offer = Offer(drafter={"lab.hesitant": Hesitant}, width={"lab.watching": Watching})
    builder = PipelineBuilder(plugins=plugins(offer)).own_width().model(model())
    with builder.drafter("lab.hesitant").width("lab.watching").build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=11)
    assert result.token_ids == text
    stats = result.stats
    assert stats.accepted == stats.verified == stats.cycles
    assert (stats.acceptance_rate, stats.rate_by_position) == (1.0, [1.0])
    assert stats.acceptance_length == 2
    assert widths[0] == (3, 3, 1)
