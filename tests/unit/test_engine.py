"""The decode loop: where texts end, what caches hold, how prompts and earlier caches are taken."""

from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from draftloom import (
    ComponentInfo,
    CycleEvent,
    GenerateOptions,
    GenerationResult,
    Pipeline,
    UsageError,
    Width,
)

from .fakes import (
    PROMPT,
    VOCAB,
    Offer,
    OneTokenEach,
    Scripted,
    fresh_cache,
    half_right,
    knows,
    model,
    pipeline_of,
    plain,
    same_caches,
)

COUNT = 24
FAMILIES = ("attention", "hybrid")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def answer(family: str = "attention", count: int = COUNT, prompt: Any = PROMPT) -> tuple[int, ...]:
    return plain(model(family), prompt, count)


def held(text: tuple[int, ...], prompt: tuple[int, ...] = PROMPT) -> tuple[int, ...]:
    """What the caches hold after a text: all but its last token."""
    return (*prompt, *text)[:-1]


def generate(pipeline: Pipeline, **options: Any) -> tuple[GenerationResult, list[Any]]:
    """A text and the caches it leaves."""
    stream = pipeline.stream(PROMPT, **options)
    chunks = list(stream)
    result = GenerationResult(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(t for chunk in chunks for t in chunk.token_ids),
        finish_reason=chunks[-1].finish_reason,
        stats=stream.stats,
        seed=stream.seed,
        pipeline=stream.names,
    )
    return result, stream.cache


# --- the loop itself -------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0, 1, 2, 4], ids="{} right".format)
def test_tokens_are_the_targets_own(family: str, right: int) -> None:
    text = answer(family)
    with pipeline_of(half_right(text, right), target=model(family)) as pipeline:
        result, caches = generate(pipeline, max_tokens=COUNT)
    assert result.token_ids == text
    assert result.finish_reason == "length"
    assert same_caches(caches, fresh_cache(model(family), held(text)))
    stats = result.stats
    assert stats.accepted_by_position[:right] == stats.verified_by_position[:right]
    assert not any(stats.accepted_by_position[right:])


def test_a_perfect_drafter_needs_few_cycles() -> None:
    drafter = knows(answer())
    with pipeline_of(drafter) as pipeline:
        stats = pipeline.generate(PROMPT, max_tokens=21).stats
    assert (stats.cycles, stats.committed, stats.acceptance_length) == (4, 20, 5.0)
    assert [width for _, width in drafter.asked] == [4, 4, 4, 4]


def test_a_drafter_is_told_every_token_once_and_in_order() -> None:
    drafter = half_right(answer(), 2)
    with pipeline_of(drafter) as pipeline:
        pipeline.generate(PROMPT, max_tokens=COUNT, prefill_chunk=3)
    told = [token for tokens in drafter.observed for token in tokens]
    assert told == [*PROMPT, *answer()][: len(told)]
    assert drafter.observed[:3] == [PROMPT[:3], PROMPT[3:6], PROMPT[6:]]
    # The anchor of each proposal is the token after all that was told until then.
    assert {anchor for anchor, _ in drafter.asked} <= set(answer())


def test_the_first_event_is_the_prompts_own_token() -> None:
    events: list[CycleEvent] = []
    with pipeline_of(half_right(answer(), 3)) as pipeline:
        pipeline.generate(PROMPT, max_tokens=10, on_cycle=events.append)
    assert [event.index for event in events] == list(range(len(events)))
    assert (events[0].token_ids, events[0].verified, events[0].source) == (answer()[:1], 0, "")
    assert [event.token_ids for event in events[1:]] == [
        answer()[1:5],
        answer()[5:9],
        answer()[9:10],
    ]
    assert [event.source for event in events[1:3]] == ["scripted", "scripted"]
    assert [event.accepted for event in events[1:3]] == [3, 3]
    assert all(event.seconds > 0 for event in events)
    assert [event.finish_reason for event in events] == [None, None, None, "length"]


# --- where texts end -------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 12))
def test_max_tokens_cuts_inside_a_block(family: str, count: int) -> None:
    text = answer(family)
    with pipeline_of(knows(text), target=model(family)) as pipeline:
        result, caches = generate(pipeline, max_tokens=count)
    assert result.token_ids == text[:count]
    assert result.stats.generated_tokens == count
    assert result.finish_reason == "length"
    assert same_caches(caches, fresh_cache(model(family), held(text[:count])))


@pytest.mark.parametrize("count", range(2, 9))
def test_no_more_is_verified_than_still_fits(count: int) -> None:
    events: list[CycleEvent] = []
    with pipeline_of(knows(answer())) as pipeline:
        pipeline.generate(PROMPT, max_tokens=count, on_cycle=events.append)
    left = count
    for event in events:
        assert event.verified < left, "the last token needs no draft"
        left -= len(event.token_ids)
    assert left == 0


def test_a_single_token_drafts_nothing() -> None:
    drafter = knows(answer())
    with pipeline_of(drafter) as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=1).token_ids == answer()[:1]
    assert drafter.asked == []


@pytest.mark.parametrize("place", range(8))
def test_end_of_sequence_cuts_inside_a_block(family: str, place: int) -> None:
    text = answer(family)
    eos = text[place]
    end = text.index(eos) + 1
    target, tokenizer = model(family), OneTokenEach([eos])
    with pipeline_of(knows(text), target=target, tokenizer=tokenizer) as pipeline:
        result, caches = generate(pipeline, max_tokens=COUNT)
    assert result.token_ids == text[:end]
    assert result.finish_reason == "stop"
    assert result.text == OneTokenEach.decode(text[: end - 1])
    assert result.stats.generated_tokens == end
    assert same_caches(caches, fresh_cache(model(family), held(text[:end])))


def test_end_of_sequence_can_be_ignored() -> None:
    text = answer()
    with pipeline_of(knows(text), tokenizer=OneTokenEach([text[3]])) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT, ignore_eos=True)
    assert result.token_ids == text
    assert result.text == OneTokenEach.decode(text)


@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_cut_inside_a_block_and_across_blocks(
    family: str, place: int, length: int
) -> None:
    text = answer(family)
    stop = OneTokenEach.decode(text[place : place + length])
    begin = OneTokenEach.decode(text).index(stop)
    end = begin + length
    with pipeline_of(knows(text), target=model(family), tokenizer=OneTokenEach()) as pipeline:
        result, caches = generate(pipeline, max_tokens=COUNT, stop=stop)
    assert result.text == OneTokenEach.decode(text[:begin])
    assert result.token_ids == text[:end]
    assert result.finish_reason == "stop"
    assert result.stats.generated_tokens == end
    assert same_caches(caches, fresh_cache(model(family), held(text[:end])))


def test_end_of_sequence_before_a_stop_string_in_one_block() -> None:
    text = answer()
    with pipeline_of(knows(text), tokenizer=OneTokenEach([text[2]])) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=9, stop=OneTokenEach.decode(text[3:4]))
    assert result.token_ids == text[: text.index(text[2]) + 1]


def test_a_stop_string_needs_a_tokenizer() -> None:
    with pipeline_of() as pipeline, pytest.raises(UsageError, match="need a tokenizer"):
        pipeline.generate(PROMPT, stop="x")


# --- cancellation ----------------------------------------------------------------------------


class After:
    """Says cancelled from the n-th time it is asked."""

    def __init__(self, times: int) -> None:
        self._left = times

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize("times", range(6))
def test_cancelling_leaves_what_was_emitted(family: str, times: int) -> None:
    text = answer(family)
    with pipeline_of(half_right(text, 2), target=model(family)) as pipeline:
        result, caches = generate(pipeline, max_tokens=COUNT, cancelled=After(times))
    emitted = result.token_ids
    assert result.finish_reason == "cancelled"
    assert emitted == text[: len(emitted)]
    assert len(emitted) < COUNT
    assert result.stats.generated_tokens == len(emitted)
    if emitted:
        assert same_caches(caches, fresh_cache(model(family), held(emitted)))


def test_it_is_polled_once_a_cycle() -> None:
    asked: list[int] = []

    def ask() -> bool:
        asked.append(1)
        return False

    with pipeline_of(knows(answer())) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT, cancelled=ask)
    # Once a chunk of the prompt, once for its last token, once a cycle.
    assert len(asked) == 1 + 1 + result.stats.cycles


def test_a_long_prompt_can_be_cancelled_between_its_chunks() -> None:
    done: list[int] = []
    with pipeline_of() as pipeline:
        result = pipeline.generate(
            PROMPT,
            prefill_chunk=2,
            cancelled=After(1),
            on_prefill=lambda so_far, total: done.append(so_far),
        )
    assert (result.token_ids, result.finish_reason) == ((), "cancelled")
    assert done == [0, 2]


def test_going_on_after_a_cancellation_gives_the_same_text() -> None:
    text = answer()
    with pipeline_of(half_right(text, 2)) as pipeline:
        first, caches = generate(pipeline, max_tokens=COUNT, cancelled=After(3))
        rest = pipeline.generate(
            first.token_ids[-1:], max_tokens=COUNT - len(first.token_ids), cache=caches
        )
    assert first.token_ids + rest.token_ids == text


def test_closing_a_stream_leaves_what_was_handed_out(family: str) -> None:
    text = answer(family)
    with pipeline_of(half_right(text, 2), target=model(family)) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        emitted = tuple(t for _ in range(3) for t in next(stream).token_ids)
        stream.close()
    assert emitted == text[:7]
    assert stream.stats.generated_tokens == 7
    assert same_caches(stream.cache, fresh_cache(model(family), held(emitted)))
    with pytest.raises(StopIteration):
        next(stream)


# --- prompts and earlier caches --------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 100])
def test_prompt_chunks_give_the_same_tokens(family: str, chunk: int) -> None:
    text, reports = answer(family), []
    with pipeline_of(half_right(text, 2), target=model(family)) as pipeline:
        result = pipeline.generate(
            PROMPT,
            max_tokens=COUNT,
            prefill_chunk=chunk,
            on_prefill=lambda *report: reports.append(report),
        )
    assert result.token_ids == text
    total = len(PROMPT)
    before_last = sorted({*range(0, total - 1, chunk), total - 1})
    assert reports == [(done, total) for done in (*before_last, total)]


@pytest.mark.parametrize("chunk", [0, -1])
def test_prompt_chunks_of_nothing_are_refused(chunk: int) -> None:
    with pipeline_of() as pipeline, pytest.raises(UsageError, match="at least 1"):
        pipeline.generate(PROMPT, max_tokens=2, prefill_chunk=chunk)


def test_an_earlier_cache_goes_on_as_one_long_prompt(family: str) -> None:
    target, turn = model(family), (3, 8, 6)
    first = answer(family, 6)
    second = answer(family, 8, (*PROMPT, *first, *turn))
    drafter = half_right(second, 2, prompt=(first[-1], *turn))
    with pipeline_of(drafter, target=target) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=6)
        assert tuple(t for chunk in stream for t in chunk.token_ids) == first
        result = pipeline.generate((first[-1], *turn), max_tokens=8, cache=stream.cache)
    assert result.token_ids == second
    assert result.stats.accepted > 0


def test_a_cache_of_mlx_lm_is_taken(family: str) -> None:
    target = model(family)
    cache = make_prompt_cache(target)
    target(mx.array([PROMPT[:-1]]), cache=cache)
    with pipeline_of(knows(answer(family)), target=target) as pipeline:
        result = pipeline.generate(PROMPT[-1:], max_tokens=COUNT, cache=cache)
    assert result.token_ids == answer(family)


def test_generations_do_not_disturb_each_other(family: str) -> None:
    text, other_prompt = answer(family), (4, 4, 2)
    other = answer(family, COUNT, other_prompt)
    with pipeline_of("prompt-lookup", target=model(family)) as pipeline:
        one = pipeline.stream(PROMPT, max_tokens=COUNT)
        two = pipeline.stream(other_prompt, max_tokens=COUNT)
        tokens: tuple[list[int], list[int]] = ([], [])
        for a, b in zip(one, two, strict=False):
            tokens[0].extend(a.token_ids)
            tokens[1].extend(b.token_ids)
        tokens[0].extend(t for chunk in one for t in chunk.token_ids)
        tokens[1].extend(t for chunk in two for t in chunk.token_ids)
    length = min(map(len, tokens))
    assert tuple(tokens[0][:length]) == text[:length]
    assert tuple(tokens[1][:length]) == other[:length]
    assert length > 3


# --- limits ----------------------------------------------------------------------------------


def test_the_context_limit_caps_the_text() -> None:
    limit = 256
    prompt = tuple(i % VOCAB for i in range(limit - 5))
    with pipeline_of("prompt-lookup") as pipeline:
        assert pipeline.target.context_limit == limit
        for wanted in (None, 100):
            result = pipeline.generate(prompt, max_tokens=wanted)
            assert len(result.token_ids) == 5
            assert result.finish_reason == "length"
        assert len(pipeline.generate(prompt, max_tokens=3).token_ids) == 3


def test_an_earlier_cache_counts_against_the_limit() -> None:
    def cache_of(tokens: int) -> Any:
        entries = make_prompt_cache(model())
        model()(mx.array([[1] * tokens]), cache=entries)
        return entries

    with pipeline_of() as pipeline:
        result = pipeline.generate((2, 3), cache=cache_of(250), max_tokens=None)
        assert len(result.token_ids) == 4
        with pytest.raises(UsageError, match="holds 256"):
            pipeline.generate([1] * 6, cache=cache_of(250))


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ((), {}, "the prompt is empty"),
        ((1,) * 256, {}, "the prompt has 256 tokens, the target's context holds 256"),
        ((1, VOCAB), {}, f"prompt token {VOCAB} is outside the vocabulary of {VOCAB}"),
        ((-1,), {}, "prompt token -1 is outside"),
        (PROMPT, {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        (PROMPT, {"temperature": -1}, "temperature must be 0 or more"),
        (PROMPT, {"top_k": VOCAB}, f"top_k {VOCAB} is not below the vocabulary size"),
        ("text", {}, "has no tokenizer"),
    ],
)
def test_requests_that_cannot_be_served(prompt: Any, options: Any, expected: str) -> None:
    with pipeline_of() as pipeline, pytest.raises(UsageError, match=expected):
        pipeline.stream(prompt, **options)


def test_greedy_acceptance_refuses_a_request_with_temperature() -> None:
    with pipeline_of(configure=lambda b: b.acceptance("greedy")) as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=3).token_ids == answer(count=3)
        with pytest.raises(UsageError, match=r"'greedy' is greedy, temperature is 0\.5"):
            pipeline.generate(PROMPT, temperature=0.5)


def test_auto_acceptance_says_which_policy_served() -> None:
    with pipeline_of() as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=2).pipeline["acceptance"] == "greedy"
        sampled = pipeline.generate(PROMPT, max_tokens=2, temperature=1.0)
    assert sampled.pipeline["acceptance"] == "speculative-sampling"


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup"])
def test_a_seed_reproduces_a_sampled_text(drafter: str) -> None:
    with pipeline_of(drafter) as pipeline:
        results = [
            pipeline.generate(PROMPT, max_tokens=16, temperature=1.0, seed=seed)
            for seed in (5, 5, 6)
        ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].token_ids != results[2].token_ids
    assert [result.seed for result in results] == [5, 5, 6]


# --- width policies --------------------------------------------------------------------------


class Recorded:
    """A width policy that follows a list and notes what it is told."""

    info = ComponentInfo("recorded")

    def __init__(self, widths: list[tuple[int, int]]) -> None:
        self._widths = widths
        self.limits: list[int] = []
        self.told: list[tuple[int, int, int]] = []

    def choose(self, limit: int) -> Width:
        self.limits.append(limit)
        return Width(*self._widths[min(len(self.limits), len(self._widths)) - 1])

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        assert seconds > 0
        self.told.append((drafted, verified, accepted))


def with_width(drafter: Any, policy: Recorded) -> Pipeline:
    return pipeline_of(
        drafter, Offer(width={"recorded": policy}), configure=lambda b: b.width("recorded")
    )


def test_a_width_policy_is_told_what_happened() -> None:
    policy = Recorded([(4, 4), (6, 2), (0, 0), (3, 3)])
    with with_width(half_right(answer(), 3), policy) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=20)
    assert result.token_ids == answer(count=20)
    assert policy.told[:4] == [(4, 4, 3), (6, 2, 2), (0, 0, 0), (3, 3, 3)]
    assert len(policy.told) == result.stats.cycles


def test_a_width_policy_is_told_the_drafters_limit() -> None:
    policy = Recorded([(3, 3)])
    drafter = Scripted(lambda text, width: [1] * width, max_width=3)
    with with_width(drafter, policy) as pipeline:
        pipeline.generate(PROMPT, max_tokens=6)
    assert set(policy.limits) == {3}


def test_width_zero_is_plain_decoding() -> None:
    drafter = knows(answer())
    with with_width(drafter, Recorded([(0, 0)])) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=8)
    assert result.token_ids == answer(count=8)
    assert (drafter.asked, result.stats.drafted, result.stats.fell_back) == ([], 0, "")


def test_a_shorter_draft_than_asked_for_is_fine() -> None:
    text = [*PROMPT, *answer()]
    drafter = Scripted(lambda known, width: text[len(known) : len(known) + len(known) % 3])
    with pipeline_of(drafter) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == answer()
    assert result.stats.fell_back == ""
    assert result.stats.accepted == result.stats.verified > 0


# --- results ---------------------------------------------------------------------------------


def test_a_result_as_plain_data() -> None:
    with pipeline_of(half_right(answer(), 2), tokenizer=OneTokenEach()) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=10)
    data = result.as_dict()
    assert data["token_ids"] == list(answer(count=10))
    assert data["text"] == OneTokenEach.decode(answer(count=10))
    assert (data["prompt_tokens"], data["generated_tokens"]) == (len(PROMPT), 10)
    assert data["cycles"] == result.stats.cycles
    assert data["accepted_by_position"] == [1.0, 1.0, 0.0, 0.0]
    assert data["pipeline"]["drafter"] == "scripted"
    assert data["decode_tokens_per_second"] == pytest.approx(9 / data["decode_seconds"])


def test_the_stream_says_what_the_result_says() -> None:
    with pipeline_of(half_right(answer(), 2), tokenizer=OneTokenEach()) as pipeline:
        chunks = list(pipeline.stream(PROMPT, max_tokens=10))
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {None}
    assert chunks[-1].finish_reason == "length"
    assert "".join(chunk.text for chunk in chunks) == OneTokenEach.decode(answer(count=10))
    assert [chunk.cycle.index for chunk in chunks] == list(range(len(chunks)))


def test_an_option_that_does_not_exist() -> None:
    with pipeline_of() as pipeline, pytest.raises(TypeError, match="max_token"):
        pipeline.generate(PROMPT, max_token=3)  # type: ignore[call-arg]
    assert GenerateOptions(stop="x").stop == ("x",)
