"""Sampling parameters are checked; the law is mlx-lm's; the two streams are independent."""

import math
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler

from draftloom import SamplingParams, SamplingState, UsageError
from draftloom.sampling import log_probs, target_law


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1 (0 is greedy decoding)"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number, got inf"),
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"temperature": True}, "temperature must be a finite number, got True"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0 (1 turns it off)"),
        ({"top_p": 1.01}, "top_p must be in (0, 1], got 1.01"),
        ({"min_p": -0.5}, "min_p must be in [0, 1], got -0.5 (0 turns it off)"),
        ({"min_p": 2}, "min_p must be in [0, 1], got 2"),
        ({"top_k": -1}, "top_k must be a whole number >= 0, got -1 (0 is off)"),
        ({"top_k": 2.5}, "top_k must be a whole number >= 0, got 2.5"),
        ({"top_k": True}, "top_k must be a whole number >= 0, got True"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "values",
    [{}, {"temperature": 0}, {"top_p": 1}, {"min_p": 1}, {"top_k": 0}, {"seed": -3}, {"seed": 0}],
)
def test_the_ends_of_the_ranges_are_taken(values: dict[str, Any]) -> None:
    assert SamplingParams(**values).greedy


def test_top_k_must_be_below_the_vocabulary() -> None:
    SamplingParams(top_k=9).check_vocabulary(10)
    with pytest.raises(UsageError, match="top_k 10 is not below the vocabulary size 10"):
        SamplingParams(top_k=10).check_vocabulary(10)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 3}, {"top_p": 0.8, "min_p": 0.05, "top_k": 5}],
    ids=str,
)
def test_the_law_is_what_mlx_lm_draws_from(filters: dict[str, Any]) -> None:
    logits = 1.2 * mx.random.normal((1, 12), key=mx.random.key(5))
    law = target_law(logits, SamplingParams(temperature=0.7, **filters))[0]
    draws = 40_000
    sampler = make_sampler(temp=0.7, **filters)
    mx.random.seed(11)
    drawn = sampler(mx.broadcast_to(log_probs(logits), (draws, 12)))
    shares = (drawn[:, None] == mx.arange(12)).mean(axis=0)
    # Five standard deviations of a share of 40,000 draws are below 0.0125.
    assert mx.abs(shares - law).max().item() < 0.0125
    assert mx.where(law == 0, shares, 0).max().item() == 0
    dropped = (law == 0).sum().item()
    assert (1 < dropped < 11) if filters else dropped == 0
    assert law.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_seed_reproduces_both_streams() -> None:
    def keys(seed: int | None) -> list[Any]:
        state = SamplingState(SamplingParams(seed=seed))
        pairs = [(state.draft_key(), state.accept_key()) for _ in range(3)]
        return [key.tolist() for pair in pairs for key in pair]

    assert keys(7) == keys(7)
    assert keys(7) != keys(8)
    assert len({tuple(key) for key in keys(7)}) == 6


def test_drafting_more_does_not_shift_the_acceptance_stream() -> None:
    one, two = (SamplingState(SamplingParams(seed=3)) for _ in range(2))
    for _ in range(5):
        one.draft_key()
    assert one.accept_key().tolist() == two.accept_key().tolist()


def test_without_a_seed_one_is_drawn_and_told() -> None:
    seeds = {SamplingState(SamplingParams()).seed for _ in range(4)}
    assert len(seeds) > 1
    seed = seeds.pop()
    again = SamplingState(SamplingParams(seed=seed))
    assert again.seed == seed
