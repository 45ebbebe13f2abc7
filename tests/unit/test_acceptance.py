"""Acceptance policies: greedy, and the exact law of speculative sampling.

The law is shown in three steps. (1) The rule itself, written out in float64 over every draft and
every acceptance, gives the target's law to 1e-12. (2) The policy's own pieces (`target_law`,
`draft_law_rows`, `residual`) are those of the rule. (3) A large seeded sample of the policy's
`accept` follows the rule: chi-square, p above 1e-4 in every case (fixed seeds: a failure is no
bad luck).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from draftloom.contracts import Draft, DraftLaw, Preserves
from draftloom.sampling import SamplingParams, SamplingState, log_probs, target_law
from draftloom.verifiers.acceptance.auto import AutoAcceptance
from draftloom.verifiers.acceptance.block_verification import BlockVerification
from draftloom.verifiers.acceptance.greedy import GreedyAcceptance
from draftloom.verifiers.acceptance.speculative_sampling import (
    SpeculativeSampling,
    draft_law_rows,
    residual,
)
from draftloom.verifiers.acceptance.typical import TypicalAcceptance
from tests.support.statistics import chi_square, filtered_law, upper_gamma

P_VALUE = 1e-4
ROWS = 40_000
FILTERS = [
    pytest.param({"temperature": 1.0}, id="t1"),
    pytest.param({"temperature": 0.6}, id="t0.6"),
    pytest.param({"temperature": 0.7, "top_p": 0.8}, id="top-p"),
    pytest.param({"temperature": 1.3, "top_k": 2}, id="top-k"),
    pytest.param({"temperature": 1.0, "min_p": 0.15}, id="min-p"),
    pytest.param({"temperature": 0.9, "top_p": 0.9, "top_k": 3, "min_p": 0.05}, id="all-filters"),
    pytest.param({"temperature": 0.8, "xtc_probability": 0.4, "xtc_threshold": 0.15}, id="xtc"),
    pytest.param(
        {
            "temperature": 1.2,
            "top_p": 0.97,
            "min_p": 0.02,
            "xtc_probability": 0.7,
            "xtc_special_tokens": (1,),
            "top_k": 3,
        },
        id="all-with-xtc",
    ),
]


def state(seed: int = 0, **params: Any) -> SamplingState:
    return SamplingState(SamplingParams(seed=seed, **params))


# --- greedy -----------------------------------------------------------------------------------


def greedy_by_loop(tokens: list[int], logits: np.ndarray) -> tuple[int, int]:
    best = [int(np.argmax(row)) for row in logits]
    for i, token in enumerate(tokens):
        if token != best[i]:
            return i, best[i]
    return len(tokens), best[len(tokens)]


@pytest.mark.parametrize(
    "policy",
    [
        GreedyAcceptance(),
        SpeculativeSampling(),
        AutoAcceptance(),
        BlockVerification(),
        TypicalAcceptance(),
    ],
    ids=lambda policy: policy.info.name,
)
@pytest.mark.parametrize("width", range(6))
def test_greedy_keeps_the_longest_right_prefix_of_every_row(width: int, policy: Any) -> None:
    rng = np.random.default_rng(width)
    logits = rng.standard_normal((200, width + 1, 3)).astype(np.float32)
    tokens = rng.integers(3, size=(200, width))
    draft = Draft.deterministic(mx.array(tokens.reshape(200, width), dtype=mx.int32))
    counts, following = policy.accept(draft, mx.array(logits), state())
    expected = [greedy_by_loop(list(t), row) for t, row in zip(tokens, logits, strict=True)]
    assert list(zip(counts.tolist(), following.tolist(), strict=True)) == expected
    assert counts.shape == following.shape == (200,)
    assert set(counts.tolist()) == set(range(width + 1)), "some outcome is never met"


@pytest.mark.parametrize("law", [DraftLaw.DENSE, DraftLaw.TOP_K])
def test_a_drawn_draft_changes_nothing_at_temperature_0(law: DraftLaw) -> None:
    rng = np.random.default_rng(4)
    logits = mx.array(rng.standard_normal((50, 4, 3)).astype(np.float32))
    tokens = mx.array(rng.integers(3, size=(50, 3)), dtype=mx.int32)
    q = mx.softmax(mx.array(rng.standard_normal((50, 3, 3)).astype(np.float32)), axis=-1)
    ids = mx.broadcast_to(mx.arange(3, dtype=mx.int32), q.shape)
    drawn = Draft(tokens, law, q, ids if law is DraftLaw.TOP_K else None)
    ours = SpeculativeSampling().accept(drawn, logits, state())
    theirs = GreedyAcceptance().accept(Draft.deterministic(tokens), logits, state())
    assert [a.tolist() for a in ours] == [a.tolist() for a in theirs]


def test_greedy_takes_the_token_that_mlx_lm_takes_at_a_tie_made_by_rounding() -> None:
    """mlx-lm takes the argmax of log-probabilities, where different logits can become equal."""
    logits = mx.array([[[1e-8, 2e-8, 30.0 - 60.0]]])
    assert mx.argmax(logits).item() == 1
    assert mx.argmax(log_probs(logits)).item() == 0
    _, following = GreedyAcceptance().accept(Draft.empty(), logits, state())
    assert following.item() == 0
    kept, _ = GreedyAcceptance().accept(
        Draft.deterministic(mx.array([[0]])), mx.concatenate([logits, logits], axis=1), state()
    )
    assert kept.item() == 1


def test_policies_say_what_they_preserve_and_auto_chooses() -> None:
    assert GreedyAcceptance().info.preserves is Preserves.GREEDY
    assert SpeculativeSampling().info.preserves is Preserves.DISTRIBUTION
    auto = AutoAcceptance()
    assert isinstance(auto.resolve(SamplingParams()), GreedyAcceptance)
    assert isinstance(auto.resolve(SamplingParams(temperature=0.1)), SpeculativeSampling)


# --- the target's law -------------------------------------------------------------------------


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("vocab", [4, 11])
def test_target_law_is_the_filtered_law(filters: dict[str, Any], vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (2 * rng.standard_normal((6, 7, vocab))).astype(np.float32)
    ours = np.array(target_law(mx.array(logits), SamplingParams(**filters)))
    expected = np.array([[filtered_law(row, **filters) for row in rows] for rows in logits])
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 2e-6
    assert np.array_equal(ours == 0, expected == 0), "other tokens are filtered out"
    if {"top_p", "min_p", "top_k"} & set(filters):
        assert (ours == 0).any(), "the filter does nothing"
    if "xtc_probability" in filters:
        without = target_law(
            mx.array(logits), SamplingParams(**{**filters, "xtc_probability": 0.0})
        )
        assert np.abs(ours - np.array(without)).max() > 0.1, "XTC does nothing"


@pytest.mark.parametrize("filters", FILTERS)
def test_target_law_is_what_mlx_lms_sampler_draws_from(filters: dict[str, Any]) -> None:
    given = {"temp" if name == "temperature" else name: v for name, v in filters.items()}
    logits = mx.array([1.2, 0.4, -0.3, 0.9, -1.5, 0.1])
    law = np.array(target_law(logits, SamplingParams(**filters)), dtype=np.float64)
    if given.get("xtc_special_tokens"):
        given["xtc_special_tokens"] = list(given["xtc_special_tokens"])
    mx.random.seed(11)
    sampler, row = make_sampler(**given), log_probs(logits)[None]
    if "xtc_probability" in given:  # its coin is one for all rows of a call
        drawn: Any = mx.concatenate([sampler(row) for _ in range(1500)]).tolist()
    else:
        drawn = sampler(mx.broadcast_to(row, (ROWS, 6))).tolist()
    assert chi_square(drawn, dict(enumerate(law / law.sum()))) > P_VALUE


# --- the rule, in float64 ---------------------------------------------------------------------


@attrs.frozen(eq=False)
class Tables:
    """Laws of target and drafter after every prefix of draft tokens.

    Attributes:
        logits: by prefix [V], of the target.
        q: by prefix [V], of the drafter (one-hot for a deterministic draft).
        width: K.
    """

    logits: dict[tuple[int, ...], np.ndarray]
    q: dict[tuple[int, ...], np.ndarray]
    width: int
    vocab: int

    def p(self, filters: dict[str, Any]) -> dict[tuple[int, ...], np.ndarray]:
        return {prefix: filtered_law(row, **filters) for prefix, row in self.logits.items()}


def prefixes(vocab: int, length: int) -> list[tuple[int, ...]]:
    return [p for n in range(length + 1) for p in itertools.product(range(vocab), repeat=n)]


def tables(law: str, vocab: int, width: int, seed: int) -> Tables:
    """Random laws that depend on the prefix; q is of the kind `law` names."""
    rng = np.random.default_rng(seed)
    logits = {s: 1.5 * rng.standard_normal(vocab) for s in prefixes(vocab, width)}
    logits = {s: row.astype(np.float32) for s, row in logits.items()}
    q = {}
    for prefix in prefixes(vocab, width - 1):
        if law == "deterministic":
            row = np.eye(vocab)[rng.integers(vocab)]
        else:
            row = rng.dirichlet(np.ones(vocab))
            if law == "top-k":
                row[np.argsort(row)[: vocab - 2]] = 0
            row = row / row.sum()
        row = row.astype(np.float32).astype(np.float64)
        q[prefix] = row / row.sum()
    return Tables(logits, q, width, vocab)


def emission_law(
    p: dict[tuple[int, ...], np.ndarray], q: dict[tuple[int, ...], np.ndarray], width: int
) -> dict[tuple[int, ...], float]:
    """Probability of every (accepted tokens.., next token), over all drafts and acceptances."""
    law: dict[tuple[int, ...], float] = {}
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(width):
        deeper: dict[tuple[int, ...], float] = {}
        for prefix, chance in reached.items():
            rejected = 0.0
            for token, proposed in enumerate(q[prefix]):
                accept = min(1.0, p[prefix][token] / proposed) if proposed > 0 else 0.0
                deeper[(*prefix, token)] = chance * proposed * accept
                rejected += chance * proposed * (1 - accept)
            left = np.maximum(p[prefix] - q[prefix], 0)
            if rejected > 0 and left.sum() > 0:
                for token, share in enumerate(left / left.sum()):
                    law[(*prefix, token)] = law.get((*prefix, token), 0.0) + rejected * share
        reached = {s: chance for s, chance in deeper.items() if chance > 0}
    for prefix, chance in reached.items():
        for token, share in enumerate(p[prefix]):
            # A prefix of full length, so that no rejection has ended there as well.
            law[(*prefix, token)] = law.get((*prefix, token), 0.0) + chance * share
    return law


def full_text_law(
    emitted: dict[tuple[int, ...], float], p: dict[tuple[int, ...], np.ndarray], width: int
) -> dict[tuple[int, ...], float]:
    """Law of the first K+1 tokens: what was emitted, gone on with by the target alone."""
    law: dict[tuple[int, ...], float] = {}
    for start, chance in emitted.items():
        rest = [(start, chance)]
        while rest:
            text, mass = rest.pop()
            if len(text) == width + 1:
                law[text] = law.get(text, 0.0) + mass
            else:
                rest += [((*text, t), mass * x) for t, x in enumerate(p[text])]
    return law


LAWS = ("deterministic", "dense", "top-k")
SIZES = [(3, 1), (4, 2), (5, 3), (3, 3)]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("vocab", "width"), SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_the_rule_gives_the_targets_law(
    law: str, vocab: int, width: int, filters: dict[str, Any]
) -> None:
    if filters.get("top_k", 0) >= vocab:
        filters = {**filters, "top_k": vocab - 1}
    given = tables(law, vocab, width, seed=vocab + width)
    p = given.p(filters)
    emitted = emission_law(p, given.q, width)
    assert abs(sum(emitted.values()) - 1) < 1e-12
    found = full_text_law(emitted, p, width)
    for text in itertools.product(range(vocab), repeat=width + 1):
        exact = np.prod([p[text[:i]][t] for i, t in enumerate(text)])
        assert abs(found.get(text, 0.0) - exact) < 1e-12


# --- the policy against the rule --------------------------------------------------------------


def batch(given: Tables, kind: str, rows: int, key: mx.array) -> tuple[Draft, mx.array]:
    """Many rows, each with a draft of its own drawn from q, and the target's logits after it."""
    vocab, width = given.vocab, given.width
    index = mx.zeros((rows,), dtype=mx.int32)  # of the prefix, among those of its length
    tokens, laws, logits = [], [], []
    keys = mx.random.split(key, max(width, 1))
    for length in range(width + 1):
        every = list(itertools.product(range(vocab), repeat=length))
        logits.append(mx.array(np.stack([given.logits[s] for s in every]))[index])
        if length == width:
            break
        q = mx.array(np.stack([given.q[s] for s in every]).astype(np.float32))[index]
        token = mx.random.categorical(mx.log(q), axis=-1, key=keys[length]).astype(mx.int32)
        tokens.append(token)
        laws.append(q)
        index = index * vocab + token
    stacked = mx.stack(logits, axis=1)
    if not width:
        return Draft.empty(rows), stacked
    drawn, q = mx.stack(tokens, axis=1), mx.stack(laws, axis=1)
    if kind == "deterministic":
        return Draft.deterministic(drawn), stacked
    if kind == "dense":
        return Draft(drawn, DraftLaw.DENSE, q), stacked
    ids = mx.argsort(-q, axis=-1)[..., :2].astype(mx.int32)
    return Draft(drawn, DraftLaw.TOP_K, mx.take_along_axis(q, ids, axis=-1), ids), stacked


def emissions(draft: Draft, counts: mx.array, following: mx.array) -> list[tuple[int, ...]]:
    tokens = draft.tokens.tolist()
    rows = zip(tokens, counts.tolist(), following.tolist(), strict=True)
    return [(*row[:n], t) for row, n, t in rows]


def sampled(
    given: Tables, kind: str, filters: dict[str, Any], policy: Any, seed: int = 3
) -> list[tuple[int, ...]]:
    sampling = state(seed, **filters)
    draft, logits = batch(given, kind, ROWS, sampling.draft_key())
    return emissions(draft, *policy.accept(draft, logits, sampling))


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("vocab", "width"), [(3, 1), (4, 2), (5, 3)])
@pytest.mark.parametrize("law", LAWS)
def test_accept_follows_the_rule(law: str, vocab: int, width: int, filters: dict[str, Any]) -> None:
    if filters.get("top_k", 0) >= vocab:
        filters = {**filters, "top_k": vocab - 1}
    given = tables(law, vocab, width, seed=vocab + width)
    p = given.p(filters)
    found = sampled(given, law, filters, SpeculativeSampling())
    assert chi_square(found, emission_law(p, given.q, width)) > P_VALUE
    first = dict(enumerate(p[()]))
    assert chi_square([e[0] for e in found], first) > P_VALUE, "law of the first token"


@pytest.mark.parametrize("filters", FILTERS)
def test_without_a_draft_the_next_token_follows_the_target(filters: dict[str, Any]) -> None:
    given = tables("dense", 5, 0, seed=1)
    found = sampled(given, "dense", filters, SpeculativeSampling())
    assert {len(e) for e in found} == {1}
    assert chi_square(found, {(t,): x for t, x in enumerate(given.p(filters)[()])}) > P_VALUE


def test_extreme_laws() -> None:
    """q = p never rejects; disjoint laws always do; a certain target stays certain."""
    logits = np.log(np.array([0.5, 0.3, 0.2, 1e-30], dtype=np.float32))
    every = prefixes(4, 2)
    p = filtered_law(logits, 1.0)
    same = Tables(dict.fromkeys(every, logits), dict.fromkeys(every, p), 2, 4)
    found = sampled(same, "dense", {"temperature": 1.0}, SpeculativeSampling())
    # p and q differ by rounding, which rejects about one in 10 million rows.
    assert sum(len(e) == 3 for e in found) >= ROWS - 2
    other = np.array([0.0, 0.0, 0.0, 1.0])
    apart = Tables(dict.fromkeys(every, logits), dict.fromkeys(every, other), 2, 4)
    found = sampled(apart, "dense", {"temperature": 1.0}, SpeculativeSampling())
    assert {len(e) for e in found} == {1}
    assert chi_square([e[0] for e in found], dict(enumerate(p / p.sum()))) > P_VALUE
    certain = np.array([0.0, 200.0, 0.0, 0.0], dtype=np.float32)
    sure = Tables(dict.fromkeys(every, certain), dict.fromkeys(every, np.full(4, 0.25)), 2, 4)
    found = sampled(sure, "dense", {"temperature": 1.0}, SpeculativeSampling())
    assert {t for e in found for t in e} == {1}


def test_residual_and_draft_rows_are_the_rules_own() -> None:
    rng = np.random.default_rng(9)
    p, q = rng.dirichlet(np.ones(5), (6, 4)), rng.dirichlet(np.ones(5), (6, 3))
    q[0] = p[0, :3]
    ours = np.array(residual(mx.array(p.astype(np.float32)), mx.array(q.astype(np.float32))))
    left = np.maximum(p[:, :3] - q, 0)
    left[0] = p[0, :3]
    assert np.abs(ours[:, :3] - left).max() < 1e-6
    assert np.array_equal(ours[:, 3], p[:, 3].astype(np.float32))
    tokens = mx.array([[2, 0]], dtype=mx.int32)
    one_hot = draft_law_rows(Draft.deterministic(tokens), 4)
    assert one_hot.tolist() == [[[0, 0, 1, 0], [1, 0, 0, 0]]]
    ids, probs = (
        mx.array([[[2, 0], [3, 0]]], dtype=mx.int32),
        mx.array([[[0.75, 0.25], [0.5, 0.5]]]),
    )
    rows = draft_law_rows(Draft(tokens, DraftLaw.TOP_K, probs, ids), 4)
    assert rows.tolist() == [[[0.25, 0, 0.75, 0], [0.5, 0, 0, 0.5]]]
    dense = Draft(tokens, DraftLaw.DENSE, mx.full((1, 2, 4), 0.25))
    assert draft_law_rows(dense, 4).tolist() == [[[0.25] * 4] * 2]


def test_rows_of_a_batch_are_decided_each_by_itself() -> None:
    """Row b of a batch has its own uniform numbers, and its own count."""
    sampling = state(2, temperature=1.0)
    rows = 4000
    logits = mx.zeros((rows, 3, 2))
    draft = Draft(mx.zeros((rows, 2), dtype=mx.int32), DraftLaw.DENSE, mx.full((rows, 2, 2), 0.5))
    draft = attrs.evolve(draft, probs=mx.broadcast_to(mx.array([1.0, 0.0]), (rows, 2, 2)))
    counts, following = SpeculativeSampling().accept(draft, logits, sampling)
    pairs = list(zip(counts.tolist(), following.tolist(), strict=True))
    # Accepted with 1/2 at each place; after a rejection always the other token.
    law = {(0, 1): 0.5, (1, 1): 0.25, (2, 0): 0.125, (2, 1): 0.125}
    assert chi_square(pairs, law) > P_VALUE
    halves = list(zip(counts.tolist()[: rows // 2], counts.tolist()[rows // 2 :], strict=True))
    single = {0: 0.5, 1: 0.25, 2: 0.25}
    joint = {(a, b): single[a] * single[b] for a in single for b in single}
    assert chi_square(halves, joint) > P_VALUE, "rows are not independent of each other"


# --- random streams ---------------------------------------------------------------------------


def keys(take: Callable[[], mx.array], count: int) -> list[tuple[int, ...]]:
    return [tuple(take().tolist()) for _ in range(count)]


def test_draft_and_acceptance_streams_are_independent() -> None:
    one, other = state(5), state(5)
    drafts, accepts = keys(one.draft_key, 50), keys(one.accept_key, 50)
    assert len({*drafts, *accepts}) == 100, "a key is used twice"
    # However many the drafter takes, the policy's stay the same, and the reverse.
    mixed = [
        (keys(other.draft_key, i % 3), keys(other.accept_key, 1), keys(other.draft_key, 1))
        for i in range(20)
    ]
    assert [key for _, taken, _ in mixed for key in taken] == accepts[:20]
    assert [key for a, _, b in mixed for key in (*a, *b)] == drafts[
        : sum(1 + i % 3 for i in range(20))
    ]


def test_a_seed_reproduces_and_another_does_not() -> None:
    given = tables("dense", 4, 2, seed=0)
    runs = [
        sampled(given, "dense", {"temperature": 1.0}, SpeculativeSampling(), seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert SamplingState(SamplingParams()).seed != SamplingState(SamplingParams()).seed


# --- that these tests can fail ----------------------------------------------------------------


class _NoResidual(SpeculativeSampling):
    """Draws the correction from p instead of the residual."""

    def accept(self, draft: Draft, logits: mx.array, sampling: SamplingState) -> Any:
        counts, _ = super().accept(draft, logits, sampling)
        p = target_law(logits, sampling.params)
        row = mx.take_along_axis(p, counts[:, None, None], axis=1)[:, 0]
        return counts, mx.random.categorical(mx.log(row), key=sampling.accept_key())


class _NoLaw(SpeculativeSampling):
    """Takes a drawn draft for a chosen one: lossless, but accepts less than it could."""

    def accept(self, draft: Draft, logits: mx.array, sampling: SamplingState) -> Any:
        return super().accept(Draft.deterministic(draft.tokens), logits, sampling)


class _OffByOne(SpeculativeSampling):
    """Judges every draft token by the row after it."""

    def accept(self, draft: Draft, logits: mx.array, sampling: SamplingState) -> Any:
        shifted = mx.concatenate([logits[:, 1:], logits[:, -1:]], axis=1)
        return super().accept(draft, shifted, sampling)


class _SharedStream(SpeculativeSampling):
    """Decides with the very numbers that the draft was drawn with: what a stream in common can
    do."""

    def accept(self, draft: Draft, logits: mx.array, sampling: SamplingState) -> Any:
        p = target_law(logits, sampling.params)
        q = draft_law_rows(draft, p.shape[-1])
        at = draft.tokens[..., None]
        ratio = (mx.take_along_axis(p[:, :-1], at, -1) / mx.take_along_axis(q, at, -1))[..., 0]
        u = draft.tokens.astype(mx.float32) / p.shape[-1]
        counts = mx.cumprod((u < ratio).astype(mx.int32), axis=1).sum(axis=1)
        law = mx.take_along_axis(residual(p, q), counts[:, None, None], axis=1)[:, 0]
        return counts, mx.random.categorical(mx.log(law), key=sampling.accept_key())


@pytest.mark.parametrize("wrong", [_NoResidual, _OffByOne, _SharedStream, _NoLaw])
def test_a_wrong_policy_is_noticed(wrong: type) -> None:
    given = tables("dense", 4, 2, seed=6)
    p = given.p({"temperature": 1.0})
    found = sampled(given, "dense", {"temperature": 1.0}, wrong())
    assert chi_square(found, emission_law(p, given.q, 2)) < 1e-12
    lossless = chi_square([e[0] for e in found], dict(enumerate(p[()]))) > P_VALUE
    assert lossless == (wrong is _NoLaw)


def test_chi_square_is_the_known_one() -> None:
    for shape, x, value in [
        (0.5, 1.9207, 0.05),
        (5.0, 9.1535, 0.05),
        (15.0, 21.8865, 0.05),
        (15.0, 7.4767, 0.99),
    ]:
        assert abs(upper_gamma(shape, x) - value) < 2e-4
    rng = np.random.default_rng(0)
    law = {0: 0.2, 1: 0.3, 2: 0.5}
    values = [chi_square(rng.choice(3, 500, p=[0.2, 0.3, 0.5]).tolist(), law) for _ in range(400)]
    assert 0.01 < np.mean(np.array(values) < 0.05) < 0.1
    assert chi_square([0, 1, 3], law) == 0.0
