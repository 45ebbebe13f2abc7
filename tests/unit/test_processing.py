"""Bias, penalties and processors: every row as mlx-lm's own processors would make it."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import make_logits_processors

from draftloom import GenerationError, SamplingParams, UsageError
from draftloom.processing import LogitsProcessing

VOCAB = 11
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=9)
PENALTY = st.sampled_from([-0.75, 0.0, 0.3, 1.1, 2.0])
SIZE = st.sampled_from([0, 1, 2, 3, 7, 20])
PARAMS = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([0.0, 0.7, 1.0, 1.3, 2]),
        "repetition_context_size": SIZE,
        "presence_penalty": PENALTY,
        "presence_context_size": SIZE,
        "frequency_penalty": PENALTY,
        "frequency_context_size": SIZE,
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -2.5, 0.1, 7]), max_size=3
        ),
    }
)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def logits_of(seed: int, rows: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array((4 * rng.standard_normal((1, rows, VOCAB))).astype(np.float32)).astype(dtype)


def by_mlx_lm(processors: Any, history: list[int], draft: list[int], logits: mx.array) -> mx.array:
    """Each row by itself, as plain decoding would."""
    rows = []
    for i in range(logits.shape[1]):
        row = logits[:, i]
        for processor in processors:
            row = processor(mx.array([*history, *draft[:i]]), row)
        rows.append(row)
    return mx.stack(rows, axis=1)


def processed(
    params: SamplingParams, history: list[int], draft: list[int], logits: mx.array, cut: int = 1
) -> mx.array:
    """Ours, where the text begins after the first `cut` tokens of the history."""
    processing = LogitsProcessing(params, history[:cut], history[cut:])
    return processing(mx.array([[history[-1], *draft]], dtype=mx.int32), logits)


def same(ours: mx.array, theirs: mx.array) -> bool:
    return ours.dtype == theirs.dtype and bool(mx.array_equal(ours, theirs).item())


@settings(max_examples=150, deadline=None)
@given(
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=25),
    draft=TOKENS,
    params=PARAMS,
    seed=st.integers(0, 5),
    dtype=st.sampled_from(sorted(DTYPES)),
    cut=st.integers(1, 25),
)
def test_every_row_is_bit_equal_to_mlx_lms(
    history: list[int],
    draft: list[int],
    params: dict[str, Any],
    seed: int,
    dtype: str,
    cut: int,
) -> None:
    logits = logits_of(seed, len(draft) + 1, DTYPES[dtype])
    expected = by_mlx_lm(make_logits_processors(**params), history, draft, logits)
    found = processed(SamplingParams(**params), history, draft, logits, min(cut, len(history)))
    assert same(found, expected)


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    draft=TOKENS,
    params=PARAMS,
    seed=st.integers(0, 5),
)
def test_mlx_lms_own_processors_can_be_given_and_come_after_the_built_in_ones(
    history: list[int], draft: list[int], params: dict[str, Any], seed: int
) -> None:
    logits = logits_of(seed, len(draft) + 1)
    theirs = make_logits_processors(repetition_penalty=1.7, frequency_penalty=0.2)
    expected = by_mlx_lm([*make_logits_processors(**params), *theirs], history, draft, logits)
    ours = SamplingParams(**params, logits_processors=theirs)
    assert same(processed(ours, history, draft, logits), expected)


def test_without_parameters_nothing_is_touched() -> None:
    logits = logits_of(0, 4)
    assert processed(SamplingParams(temperature=0.7), [1, 2], [3, 4, 5], logits) is logits
    assert not SamplingParams(repetition_penalty=0).edits_logits
    assert SamplingParams(logit_bias={1: 2.0}).edits_logits


def test_a_row_is_penalised_by_the_drafts_before_it_and_not_by_those_after() -> None:
    params = SamplingParams(presence_penalty=1.0)
    found = processed(params, [0], [1, 2], mx.zeros((1, 3, 4)))
    assert found.tolist() == [[[-1, 0, 0, 0], [-1, -1, 0, 0], [-1, -1, -1, 0]]]


def test_a_context_size_counts_prompt_text_and_draft() -> None:
    params = SamplingParams(frequency_penalty=1.0, frequency_context_size=2)
    found = processed(params, [3, 3, 0], [0, 1], mx.zeros((1, 3, 4)))
    assert found.tolist() == [[[-1, 0, 0, -1], [-2, 0, 0, 0], [-1, -1, 0, 0]]]


# --- processors of the user's own -------------------------------------------------------------


class Noting:
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        assert tokens.dtype == mx.int32
        assert logits.shape == (1, VOCAB)
        self.calls.append(tokens.tolist())
        return logits


def test_a_processor_sees_the_history_of_each_row_as_the_text_grows() -> None:
    noting, text = Noting(), [7]
    processing = LogitsProcessing(SamplingParams(logits_processors=noting), [5, 6], text)
    processing(mx.array([[7, 1, 2]], dtype=mx.int32), logits_of(0, 3))
    assert noting.calls == [[5, 6, 7], [5, 6, 7, 1], [5, 6, 7, 1, 2]]
    noting.calls.clear()
    text += [1, 9]
    processing(mx.array([[9]], dtype=mx.int32), logits_of(0, 1))
    assert noting.calls == [[5, 6, 7, 1, 9]]


def failing_at(length: int, result: Any = None) -> Any:
    def processor(tokens: mx.array, logits: mx.array) -> Any:
        if tokens.size < length:
            return logits + 1
        if result is None:
            raise ValueError("no such state")
        return result(logits)

    return processor


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "a logits processor (processor) failed: no such state"),
        (
            lambda x: x[0],
            "a logits processor (processor) failed: it returned shape (11,) for logits (1, 11)",
        ),
        (
            lambda x: x.tolist(),
            "a logits processor (processor) failed: it returned list for logits (1, 11)",
        ),
    ],
    ids=["raises", "shape", "list"],
)
def test_a_failure_counts_only_where_the_row_is_used(result: Any, message: str) -> None:
    logits = logits_of(1, 4)
    params = SamplingParams(logits_processors=[failing_at(4, result)])
    processing = LogitsProcessing(params, [1, 2], [])
    found = processing(mx.array([[2, 3, 4, 5]], dtype=mx.int32), logits)
    assert same(found[:, :2], logits[:, :2] + 1)
    assert mx.isfinite(found).all().item()
    processing.check_used(2)
    with pytest.raises(GenerationError) as caught:
        processing.check_used(3)
    assert str(caught.value) == message
    at_once = LogitsProcessing(params, [1, 2, 3, 4], [])
    with pytest.raises(GenerationError):
        at_once(mx.array([[4]], dtype=mx.int32), logits_of(1, 1))


def test_a_row_without_a_token_counts_only_where_it_is_used() -> None:
    params = SamplingParams(logits_processors=[failing_at(4, lambda x: x - mx.inf)])
    processing = LogitsProcessing(params, [1, 2], [])
    found = processing(mx.array([[2, 3, 4]], dtype=mx.int32), logits_of(1, 3))
    assert mx.isfinite(found).all().item(), "NaN in a row that is not used could spoil the others"
    assert processing.dead is not None
    flags: Any = processing.dead.tolist()
    assert flags == [False, False, True]
    processing.check_used(2, flags)
    with pytest.raises(GenerationError, match="left no token that may come"):
        processing.check_used(3, flags)


def test_a_failure_does_not_change_the_type_of_the_other_rows() -> None:
    params = SamplingParams(logits_processors=[failing_at(3)])
    logits = logits_of(1, 3, mx.bfloat16)
    found = LogitsProcessing(params, [1], [])(mx.array([[1, 3, 4]], dtype=mx.int32), logits)
    assert found.dtype == mx.bfloat16


def test_several_rows_are_refused() -> None:
    """Each would need a history of its own."""
    two = mx.array([[1, 2], [3, 4]], dtype=mx.int32), mx.zeros((2, 2, VOCAB))
    assert LogitsProcessing(SamplingParams(), [1], [])(*two) is two[1]
    with pytest.raises(GenerationError, match="serve one text, not 2 rows"):
        LogitsProcessing(SamplingParams(presence_penalty=1.0), [1], [])(*two)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"repetition_penalty": -1}, "repetition_penalty must be 0 or more, got -1 (1 is off)"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be a finite number, got inf"),
        ({"presence_penalty": "x"}, "presence_penalty must be a finite number, got 'x'"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a finite number, got nan"),
        ({"repetition_context_size": -1}, "repetition_context_size must be a whole number >= 0"),
        ({"presence_context_size": 2.5}, "presence_context_size must be a whole number >= 0"),
        ({"frequency_context_size": None}, "frequency_context_size must be a whole number >= 0"),
        ({"logit_bias": 3}, "logit_bias must map token ids to numbers, got 3"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias names token -1"),
        ({"logit_bias": {"x": 2.0}}, "logit_bias names token 'x'"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": [(1, 2.0), (1, 3.0)]}, "logit_bias names token 1 twice"),
        ({"logits_processors": 3}, "a logits processor must be callable"),
        ({"logits_processors": [print, "x"]}, "a logits processor must be callable, got 'x'"),
        ({"xtc_probability": 1.5}, "xtc_probability must be in [0, 1], got 1.5"),
        ({"xtc_threshold": 0.6}, "xtc_threshold must be in [0, 0.5], got 0.6"),
        ({"xtc_probability": 0.5}, "xtc_probability needs a temperature above 0"),
        ({"xtc_special_tokens": "12"}, "xtc_special_tokens must be a list of token ids"),
        ({"xtc_special_tokens": [1, -2]}, "xtc_special_tokens names token -2"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith(message)


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    SamplingParams(logit_bias={9: 1.0}, xtc_special_tokens=[9]).check_vocabulary(10)
    with pytest.raises(UsageError, match="logit_bias names token 10, the vocabulary has 10"):
        SamplingParams(logit_bias={10: 1.0}).check_vocabulary(10)
    with pytest.raises(UsageError, match="xtc_special_tokens names token 12"):
        SamplingParams(xtc_special_tokens=[12]).check_vocabulary(10)


def test_bias_is_read_in_every_form() -> None:
    forms = [{3: 1, 1: -2.0}, {"3": 1.0, "1": -2}, ((3, 1.0), (1, -2.0))]
    assert {SamplingParams(logit_bias=form).logit_bias for form in forms} == {((1, -2.0), (3, 1.0))}
