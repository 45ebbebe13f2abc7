"""Counts and rates of a generation, from events made by hand."""

import attrs
import pytest

from draftloom import CycleEvent, GenerationStats


def event(index: int, tokens: int, verified: int, accepted: int, **more: object) -> CycleEvent:
    values = {
        "index": index,
        "token_ids": tuple(range(tokens)),
        "drafted": verified,
        "verified": verified,
        "accepted": accepted,
        "source": "x" if verified else "",
        "seconds": 0.5,
    }
    return CycleEvent(**(values | more))  # type: ignore[arg-type]


def stats_of(*events: CycleEvent) -> GenerationStats:
    stats = GenerationStats(prompt_tokens=3)
    for e in events:
        stats.add(e)
    return stats


def test_no_cycles_no_rates() -> None:
    stats = GenerationStats()
    assert (stats.acceptance_length, stats.acceptance_rate) == (0.0, 0.0)
    assert (stats.decode_tokens_per_second, stats.rate_by_position) == (0.0, [])


def test_the_prompts_own_token_is_in_no_rate() -> None:
    stats = stats_of(event(0, 1, 0, 0, seconds=2.0))
    assert (stats.generated_tokens, stats.cycles, stats.committed) == (1, 0, 0)
    assert (stats.prefill_seconds, stats.decode_seconds) == (2.0, 0.0)
    assert stats.acceptance_length == 0.0


def test_rates_of_three_cycles() -> None:
    stats = stats_of(
        event(0, 1, 0, 0, seconds=2.0), event(1, 4, 3, 3), event(2, 1, 3, 0), event(3, 3, 4, 2)
    )
    assert (stats.prompt_tokens, stats.generated_tokens, stats.cycles) == (3, 9, 3)
    assert stats.committed == 8
    assert stats.acceptance_length == pytest.approx(1 + 5 / 3)
    assert stats.acceptance_rate == pytest.approx(5 / 10)
    assert stats.verified_by_position == [3, 3, 3, 1]
    assert stats.accepted_by_position == [2, 2, 1, 0]
    assert stats.rate_by_position == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])
    assert stats.decode_tokens_per_second == pytest.approx(8 / 1.5)


def test_cycles_without_a_draft_lower_the_length_but_not_the_rate() -> None:
    stats = stats_of(event(0, 1, 0, 0), event(1, 3, 2, 2), event(2, 1, 0, 0))
    assert stats.acceptance_length == 2.0
    assert stats.acceptance_rate == 1.0
    assert stats.rate_by_position == [1.0, 1.0]


def test_tokens_that_nobody_looked_at_are_neither_accepted_nor_rejected() -> None:
    stats = stats_of(event(0, 1, 0, 0), event(1, 3, 2, 2, drafted=15))
    assert (stats.drafted, stats.verified, stats.accepted) == (15, 2, 2)
    assert stats.acceptance_rate == 1.0


def test_a_cut_block_counts_its_acceptance_and_only_the_tokens_kept() -> None:
    stats = stats_of(event(0, 1, 0, 0), event(1, 2, 4, 4, finish_reason="stop"))
    assert stats.generated_tokens == 3
    assert stats.acceptance_length == 5.0


def test_a_cancelled_cycle_is_not_counted() -> None:
    before = stats_of(event(0, 1, 0, 0), event(1, 3, 2, 2))
    after = attrs.evolve(before)
    after.add(event(2, 0, 2, 1, finish_reason="cancelled"))
    assert after == before


def test_an_event_is_frozen_and_turns_into_plain_data() -> None:
    cycle = event(1, 2, 3, 1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        cycle.accepted = 2  # type: ignore[misc]
    assert cycle.as_dict() == {
        "index": 1,
        "token_ids": (0, 1),
        "drafted": 3,
        "verified": 3,
        "accepted": 1,
        "source": "x",
        "seconds": 0.5,
        "finish_reason": None,
    }
