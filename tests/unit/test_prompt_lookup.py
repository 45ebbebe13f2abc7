"""Prompt lookup: what a re-scan of the whole text would find, at a constant price a token."""

from collections.abc import Sequence

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom import DraftRequest, SamplingParams, SamplingState
from draftloom.drafters import prompt_lookup
from draftloom.drafters.prompt_lookup import PromptLookupDrafter

from .fakes import PROMPT, model, pipeline_of, plain, quick

SAMPLING = SamplingState(SamplingParams(seed=1))


def rescan(text: Sequence[int], sizes: range, width: int) -> list[int]:
    """The naive method: search the whole text for its ending, copy what followed the last hit.
    What follows must have been there before the last token."""
    for size in sizes:
        ending = list(text[-size:])
        if len(ending) < size:
            continue
        for start in range(len(text) - size - 2, -1, -1):
            if list(text[start : start + size]) == ending:
                copied = list(text)
                for position in range(start + size, start + size + width):
                    copied.append(copied[position])
                return copied[len(text) :]
    return []


def proposed(chunks: Sequence[Sequence[int]], anchor: int, width: int, *sizes: int) -> list[int]:
    session = PromptLookupDrafter(*sizes).open(DraftRequest(((0,),), SAMPLING, 8))
    for chunk in chunks:
        session.observe((tuple(chunk),), None)
    draft = session.propose(mx.array([anchor], dtype=mx.int32), width, SAMPLING)
    (tokens,) = draft.tokens.tolist()
    return tokens


@quick
@given(
    st.lists(st.integers(0, 2), max_size=24),
    st.integers(0, 2),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.data(),
)
def test_finds_what_a_rescan_finds(
    text: list[int], anchor: int, width: int, a: int, b: int, data: st.DataObject
) -> None:
    low, high = min(a, b), max(a, b)
    cut = data.draw(st.integers(0, len(text)))
    expected = rescan([*text, anchor], range(high, low - 1, -1), width)
    assert proposed([text[:cut], text[cut:]], anchor, width, high, low) == expected


def test_the_longest_ending_wins_over_the_latest() -> None:
    text = [1, 2, 3, 7, 7, 2, 3, 9, 9, 1, 2]
    assert proposed([text], 3, 2, 3, 1) == [7, 7]
    assert proposed([text], 3, 2, 2, 1) == [9, 9]


def test_a_repetition_goes_on() -> None:
    assert proposed([[5, 6, 5]], 6, 5) == [5, 6, 5, 6, 5]


def test_nothing_known_nothing_proposed() -> None:
    assert proposed([[1, 2, 3]], 4, 3) == []
    assert proposed([], 4, 3) == []


class CountingDict(dict):
    """A dict that counts what is written to it."""

    writes = 0

    def __setitem__(self, key: object, value: object) -> None:
        CountingDict.writes += 1
        super().__setitem__(key, value)


def test_a_token_costs_one_entry_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    class Counted(prompt_lookup._Index):
        def __init__(self, sizes: range) -> None:
            super().__init__(sizes)
            self._follows = CountingDict(self._follows)
            made.append(self)

    monkeypatch.setattr(prompt_lookup, "_Index", Counted)
    monkeypatch.setattr(CountingDict, "writes", 0)
    session = PromptLookupDrafter(3, 1).open(DraftRequest(((0,),), SAMPLING, 8))
    assert made
    session.observe((tuple(i % 7 for i in range(1000)),), None)
    assert CountingDict.writes <= 3 * 1000
    for step in range(50):
        before = CountingDict.writes
        session.propose(mx.array([step % 7]), 4, SAMPLING)
        assert CountingDict.writes == before, "a proposal writes nothing"
        session.observe(((step % 7, (step + 1) % 7),), None)
        assert CountingDict.writes - before == 3 * 2, "and is not paid again for the old text"


def test_generations_do_not_share_an_index() -> None:
    drafter = PromptLookupDrafter()
    request = DraftRequest(((0,),), SAMPLING, 8)
    first, second = drafter.open(request), drafter.open(request)
    first.observe(((1, 2, 1),), None)
    assert second.propose(mx.array([2]), 3, SAMPLING).width == 0


def test_rows_are_looked_up_apart_and_cut_to_the_shortest() -> None:
    session = PromptLookupDrafter().open(DraftRequest(((0,), (0,)), SAMPLING, 8))
    session.observe(((1, 2, 1), (3, 4, 5, 3)), None)
    draft = session.propose(mx.array([2, 4]), 3, SAMPLING)
    assert draft.tokens.tolist() == [[1, 2, 1], [5, 3, 4]]
    assert session.propose(mx.array([2, 0]), 3, SAMPLING).width == 0


@pytest.mark.parametrize("sizes", [(0, 0), (2, 3), (3, 0)])
def test_sizes_that_make_no_sense(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= min_ngram <= max_ngram"):
        PromptLookupDrafter(*sizes)


def test_on_a_repeating_text_it_saves_cycles() -> None:
    prompt = PROMPT * 3
    with pipeline_of("prompt-lookup") as pipeline:
        result = pipeline.generate(prompt, max_tokens=30)
    assert result.token_ids == plain(model(), prompt, 30)
    assert result.stats.drafted > 0
