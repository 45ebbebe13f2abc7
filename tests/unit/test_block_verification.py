"""Block verification and typical acceptance, as `test_acceptance` looks at the others.

The rule is written out in float64 over every draft and every outcome: its law is the target's to
1e-12, and it keeps no fewer tokens than token-wise sampling. The policy then follows the rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest

from draftloom.contracts import Draft, DraftLaw, Preserves
from draftloom.sampling import SamplingParams, SamplingState, law_of
from draftloom.verifiers.acceptance.block_verification import (
    BlockVerification,
    keep_chances,
    prefix_shares,
)
from draftloom.verifiers.acceptance.speculative_sampling import (
    SpeculativeSampling,
    at_tokens,
    draft_law_rows,
    draw_row,
)
from draftloom.verifiers.acceptance.typical import TypicalAcceptance
from tests.support.statistics import chi_square, filtered_law

from .test_acceptance import (
    FILTERS,
    LAWS,
    P_VALUE,
    SIZES,
    Tables,
    emission_law,
    full_text_law,
    prefixes,
    sampled,
    tables,
)

Laws = dict[tuple[int, ...], np.ndarray]
Outcome = tuple[tuple[int, ...], np.ndarray]


def rule(p: Laws, q: Laws, width: int) -> Iterator[tuple[float, tuple[int, ...], np.ndarray]]:
    """(chance, kept prefix, law of the next token), over all drafts. Source: 2403.10444, alg. 2."""
    vocab = len(p[()])
    for draft in itertools.product(range(vocab), repeat=width):
        chance = float(np.prod([q[draft[:i]][t] for i, t in enumerate(draft)]))
        if not chance:
            continue
        share, keep, left = 1.0, [1.0], []
        for i in range(width + 1):
            here, prefix = share, draft[:i]
            if i < width:
                residual = np.maximum(here * p[prefix] - q[prefix], 0)
                mass = residual.sum()
                left.append(residual / mass if mass > 0 else p[prefix])
                if i:
                    total = mass + 1 - here
                    keep.append(mass / total if total > 0 else 0.0)
                share = min(1.0, here * p[prefix][draft[i]] / q[prefix][draft[i]])
            else:
                keep.append(here)
                left.append(p[prefix])
        rest = chance
        for i in range(width, -1, -1):
            yield rest * keep[i], draft[:i], left[i]
            rest *= 1 - keep[i]


def block_law(p: Laws, q: Laws, width: int) -> dict[tuple[int, ...], float]:
    """Probability of every (kept tokens.., next token)."""
    law: dict[tuple[int, ...], float] = {}
    for chance, prefix, following in rule(p, q, width):
        for token, share in enumerate(following):
            law[(*prefix, token)] = law.get((*prefix, token), 0.0) + chance * share
    return law


def mean_kept(law: dict[tuple[int, ...], float]) -> float:
    return sum(chance * (len(text) - 1) for text, chance in law.items())


def fitted(filters: dict[str, Any], vocab: int) -> dict[str, Any]:
    return {**filters, "top_k": vocab - 1} if filters.get("top_k", 0) >= vocab else filters


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(("vocab", "width"), SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_the_rule_gives_the_targets_law_and_keeps_no_fewer(
    law: str, vocab: int, width: int, filters: dict[str, Any]
) -> None:
    given = tables(law, vocab, width, seed=vocab + width)
    check_rule(given.p(fitted(filters, vocab)), given.q, width, vocab)


def check_rule(p: Laws, q: Laws, width: int, vocab: int) -> tuple[float, float]:
    """Tokens kept on average, by block and token-wise."""
    emitted = block_law(p, q, width)
    assert abs(sum(emitted.values()) - 1) < 1e-12
    found = full_text_law(emitted, p, width)
    for text in itertools.product(range(vocab), repeat=width + 1):
        exact = np.prod([p[text[:i]][t] for i, t in enumerate(text)])
        assert abs(found.get(text, 0.0) - exact) < 1e-12
    block, token = mean_kept(emitted), mean_kept(emission_law(p, q, width))
    assert block >= token - 1e-12
    return block, token


def test_more_is_kept_than_token_by_token_and_the_same_of_chosen_tokens() -> None:
    gains = []
    for seed in range(40):
        given = tables("dense", 3, 3, seed)
        block, token = check_rule(given.p({"temperature": 1.0}), given.q, 3, 3)
        gains.append(block - token)
        chosen = tables("deterministic", 3, 3, seed)
        block, token = check_rule(chosen.p({"temperature": 1.0}), chosen.q, 3, 3)
        assert abs(block - token) < 1e-12
    assert min(gains) > 0
    assert np.mean(gains) > 0.03


ADVERSARIAL = {
    "equal": ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
    "apart": ([0.6, 0.4, 0.0], [0.0, 0.0, 1.0]),
    "certain target": ([0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
    "certain drafter": ([1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]),
    "both certain": ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]),
    "certain of another": ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]),
    "turned round": ([0.9, 0.09, 0.01], [0.01, 0.09, 0.9]),
    "rare": ([1e-7, 0.5, 0.4999999], [0.9999998, 1e-7, 1e-7]),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("mixed", [False, True], ids=["same", "mixed"])
def test_adversarial_laws(case: str, width: int, mixed: bool) -> None:
    target, drafter = (np.array(row) / np.sum(row) for row in ADVERSARIAL[case])
    p, q, logits = {}, {}, {}
    for prefix in prefixes(3, width):
        turn = sum(prefix) % 3 if mixed else 0
        p[prefix], q[prefix] = np.roll(target, turn), np.roll(drafter, -turn)
        with np.errstate(divide="ignore"):
            logits[prefix] = np.maximum(np.log(p[prefix]), -200).astype(np.float32)
    check_rule(p, q, width, 3)
    found = sampled(Tables(logits, q, width, 3), "dense", {"temperature": 1.0}, BlockVerification())
    # Chances that float32 cannot tell from zero are left out of the law.
    law = {text: chance for text, chance in block_law(p, q, width).items() if chance > 1e-12}
    assert chi_square(found, law) > P_VALUE


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    ("vocab", "width"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.slow), (5, 3)]
)
@pytest.mark.parametrize("law", LAWS)
def test_accept_follows_the_rule(law: str, vocab: int, width: int, filters: dict[str, Any]) -> None:
    filters = fitted(filters, vocab)
    given = tables(law, vocab, width, seed=vocab + width)
    p = given.p(filters)
    found = sampled(given, law, filters, BlockVerification())
    assert chi_square(found, block_law(p, given.q, width)) > P_VALUE
    first = dict(enumerate(p[()]))
    assert chi_square([e[0] for e in found], first) > P_VALUE, "law of the first token"


def test_without_a_draft_the_next_token_follows_the_target() -> None:
    given = tables("dense", 5, 0, seed=1)
    found = sampled(given, "dense", {"temperature": 1.0}, BlockVerification())
    law = {(t,): x for t, x in enumerate(given.p({"temperature": 1.0})[()])}
    assert chi_square(found, law) > P_VALUE


def test_a_row_that_cannot_follow_does_not_spoil_those_before_it() -> None:
    """After a draft token of probability 0 the rows may hold anything; NaN in them is ignored."""
    logits = mx.array([[[0.0, 1.0, -mx.inf], [mx.nan] * 3, [0.0] * 3]])
    logits = mx.broadcast_to(logits, (4000, 3, 3))
    tokens = mx.broadcast_to(mx.array([[2, 0]]), (4000, 2))
    sampling = SamplingState(SamplingParams(temperature=1.0, seed=1))
    for policy in (BlockVerification(), SpeculativeSampling(), TypicalAcceptance()):
        counts, following = policy.accept(Draft.deterministic(tokens), logits, sampling)
        assert set(counts.tolist()) == {0}
        law = filtered_law(np.array([0.0, 1.0, -1e9]), 1.0)
        assert chi_square(following.tolist(), dict(enumerate(law))) > P_VALUE


class _StopsAtTheFirst(BlockVerification):
    """Keeps the prefix before the first length that fails: biased."""

    def accept(self, draft: Draft, logits: mx.array, sampling: SamplingState) -> Any:
        p, width = law_of(logits, sampling.params), draft.width
        q = draft_law_rows(draft, p.shape[-1])
        shares = prefix_shares(at_tokens(p, draft.tokens), at_tokens(q, draft.tokens))
        left = mx.maximum(shares[:, :width, None] * p[:, :width] - q, 0)
        chances = keep_chances(shares, left.sum(axis=-1))
        u = mx.random.uniform(shape=draft.tokens.shape, key=sampling.accept_key())
        counts = mx.cumprod((u < chances).astype(mx.int32), axis=1).sum(axis=1)
        law = mx.concatenate([left, p[:, width:]], axis=1)
        return counts, draw_row(law, counts, sampling)


def test_stopping_at_the_first_failure_is_noticed() -> None:
    given = tables("dense", 4, 2, seed=6)
    p = given.p({"temperature": 1.0})
    found = sampled(given, "dense", {"temperature": 1.0}, _StopsAtTheFirst())
    assert chi_square(found, block_law(p, given.q, 2)) < 1e-12


def test_tokens_that_the_drafter_does_not_stand_by_are_judged_like_the_others() -> None:
    rng = np.random.default_rng(8)
    logits = mx.array(rng.standard_normal((200, 4, 5)).astype(np.float32))
    q = mx.softmax(mx.array(rng.standard_normal((200, 3, 5)).astype(np.float32)), axis=-1)
    drawn = mx.random.categorical(mx.log(q), key=mx.random.key(3)).astype(mx.int32)
    draft = Draft(drawn, DraftLaw.DENSE, q)
    cut = attrs.evolve(draft, lengths=mx.ones((200,), dtype=mx.int32))
    found = []
    for given in (draft, cut):
        sampling = SamplingState(SamplingParams(temperature=1.0, seed=4))
        found.append([a.tolist() for a in BlockVerification().accept(given, logits, sampling)])
    assert found[0] == found[1]
    assert max(found[0][0]) == 3


# --- typical ----------------------------------------------------------------------------------


def test_policies_say_what_they_preserve() -> None:
    assert BlockVerification.info.preserves is Preserves.DISTRIBUTION
    assert BlockVerification.info.lossless
    assert TypicalAcceptance.info.preserves is Preserves.NOTHING
    assert not TypicalAcceptance.info.lossless


@pytest.mark.parametrize(("epsilon", "delta"), [(0.09, 0.3), (0.3, 1.0), (0.02, 0.05)])
def test_typical_keeps_what_its_rule_keeps(epsilon: float, delta: float) -> None:
    rng = np.random.default_rng(3)
    logits = (2 * rng.standard_normal((500, 4, 6))).astype(np.float32)
    tokens = rng.integers(6, size=(500, 3))
    policy = TypicalAcceptance(epsilon, delta)
    state = SamplingState(SamplingParams(temperature=0.8, seed=1))
    counts, following = policy.accept(
        Draft.deterministic(mx.array(tokens)), mx.array(logits), state
    )
    expected = []
    for row, draft in zip(logits, tokens, strict=True):
        kept = 0
        for i, token in enumerate(draft):
            law = filtered_law(row[i], 0.8)
            if law[token] <= min(epsilon, delta * np.exp((law * np.log(law)).sum())):
                break
            kept += 1
        expected.append(kept)
    assert counts.tolist() == expected
    assert {0, 1, 2, 3} == set(expected)
    assert following.shape == (500,)


def test_typical_is_lossy() -> None:
    """Where the target is unsure, every draft token is taken."""
    every = prefixes(3, 1)
    logits = dict.fromkeys(every, np.array([0.0, 0.1, 0.2], dtype=np.float32))
    given = Tables(logits, dict.fromkeys(every, np.eye(3)[0]), 1, 3)
    found = sampled(given, "deterministic", {"temperature": 1.0}, TypicalAcceptance())
    assert {e[0] for e in found} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, r"epsilon must be in \(0, 1\), got 0"),
        ({"epsilon": 1}, r"epsilon must be in \(0, 1\), got 1"),
        ({"delta": 0}, r"delta must be in \(0, 1\], got 0"),
        ({"delta": 1.5}, r"delta must be in \(0, 1\], got 1.5"),
    ],
)
def test_typical_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TypicalAcceptance(**options)


def test_one_draft_law_is_as_good_as_another() -> None:
    """A top-k draft and the dense one of the same law are judged alike."""
    given = tables("top-k", 4, 2, seed=2)
    few, all_of_them = (
        sampled(given, kind, {"temperature": 1.0}, BlockVerification(), seed=5)
        for kind in ("top-k", "dense")
    )
    assert few == all_of_them
