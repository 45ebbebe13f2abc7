"""`stream_generate` yields what mlx-lm's yields; `load` builds with defaults."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen3_5 import GatedDeltaNet
from mlx_lm.sample_utils import make_logits_processors

import draftloom
from draftloom import GraphError, ModelError, UsageError

from .fakes import (
    ATTENTION,
    HYBRID,
    fresh_cache,
    new_model,
    plain,
    plugins,
    same_caches,
    tokenizer,
    write_config,
)

VOCAB = 8192
TEXT = "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return"
COUNT = 20


@cache
def target(family: str = "attention") -> nn.Module:
    return new_model(HYBRID if family == "hybrid" else ATTENTION, vocab_size=VOCAB)


@cache
def draft_model(family: str = "attention") -> nn.Module:
    config = HYBRID if family == "hybrid" else ATTENTION
    return new_model(config, 1, vocab_size=VOCAB, num_hidden_layers=2)


@pytest.fixture(params=["attention", "hybrid"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def theirs(family: str, prompt: Any = TEXT, tok: Any = None, **options: Any) -> list[Any]:
    options = {"max_tokens": COUNT} | options
    return list(mlx_lm.stream_generate(target(family), tok or tokenizer(), prompt, **options))


def ours(family: str, prompt: Any = TEXT, tok: Any = None, **options: Any) -> list[Any]:
    options = {"max_tokens": COUNT} | options
    return list(draftloom.stream_generate(target(family), tok or tokenizer(), prompt, **options))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    """Field by field; what depends on the clock or on drafting has only to be there."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for field in ("token", "text", "finish_reason", "generation_tokens", "prompt_tokens"):
            assert getattr(a, field) == getattr(b, field), field
        assert type(a.token) is int
        assert a.logprobs.shape == b.logprobs.shape
        assert mx.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5).item()
        assert a.prompt_tps > 0
        assert a.generation_tps > 0
        assert a.peak_memory >= 0


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


# --- the same as mlx-lm ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, COUNT])
def test_yields_what_mlx_lm_yields(family: str, count: int) -> None:
    assert_same(ours(family, max_tokens=count), theirs(family, max_tokens=count))


@pytest.mark.parametrize(
    "options",
    [
        {"drafter": "none"},
        {"num_draft_tokens": 1},
        {"num_draft_tokens": 9},
        {"prefill_step_size": 3},
    ],
    ids=str,
)
def test_options_change_no_response(options: dict[str, Any]) -> None:
    assert_same(ours("attention", **options), theirs("attention"))


@pytest.mark.parametrize("drafting", ["attention", "hybrid"])
def test_a_draft_model(family: str, drafting: str) -> None:
    found = ours(family, draft_model=draft_model(drafting), num_draft_tokens=3)
    assert_same(found, theirs(family))


def test_the_target_as_its_own_draft_model_is_accepted() -> None:
    twin = new_model(ATTENTION, vocab_size=VOCAB)
    found = ours("attention", draft_model=twin, num_draft_tokens=3)
    assert_same(found, theirs("attention"))
    assert [r.from_draft for r in found[:9]] == [False] + [True, True, True, False] * 2


@pytest.mark.parametrize("place", [0, 1, 4, 6])
def test_end_of_sequence(family: str, place: int) -> None:
    tok = copy.copy(tokenizer())
    tok._eos_token_ids = {theirs(family)[place].token}
    found = ours(family, tok=tok)
    assert_same(found, theirs(family, tok=tok))
    assert found[-1].finish_reason == "stop"


@pytest.mark.parametrize("form", [list, tuple, mx.array], ids=["list", "tuple", "array"])
def test_prompts_of_token_ids(form: Any) -> None:
    ids = tokenizer().encode(TEXT)
    assert_same(ours("attention", form(ids)), theirs("attention", mx.array(ids)))


def test_a_bare_transformers_tokenizer() -> None:
    bare = tokenizer()._tokenizer
    assert_same(ours("attention", tok=bare), theirs("attention", tok=bare))


def test_progress_is_told_as_mlx_lm_tells_it() -> None:
    calls: tuple[list[Any], list[Any]] = ([], [])
    for run, seen in zip((ours, theirs), calls, strict=True):
        run(
            "attention",
            max_tokens=2,
            prefill_step_size=4,
            prompt_progress_callback=lambda *report, seen=seen: seen.append(report),
        )
    assert calls[0] == calls[1]
    assert calls[0][0][0] == 0
    assert calls[0][-1][0] == calls[0][-1][1]


def test_minus_one_goes_up_to_the_context_limit() -> None:
    ids = [7] * (ATTENTION["max_position_embeddings"] - 3)
    assert len(ours("attention", ids, max_tokens=-1)) == 3


def test_sampling_parameters_are_numbers() -> None:
    def sampled(**options: Any) -> list[int]:
        return [r.token for r in ours("attention", temperature=1.0, **options)]

    assert sampled(seed=1) == sampled(seed=1)
    assert sampled(seed=1) != sampled(seed=2)
    assert sampled(seed=1, top_k=1) == [r.token for r in theirs("attention")]


# --- caches ----------------------------------------------------------------------------------


def test_a_prompt_cache_ends_as_mlx_lms_does(family: str) -> None:
    caches = [make_prompt_cache(target(family)) for _ in range(2)]
    ours(family, prompt_cache=caches[0], max_tokens=9)
    theirs(family, prompt_cache=caches[1], max_tokens=9)
    assert same_caches(caches[0], caches[1])


def take(responses: Iterator[Any], count: int) -> list[Any]:
    """The first responses; then the loop is left, as with `break`."""
    taken = []
    for response in responses:
        taken.append(response)
        if len(taken) == count:
            break
    responses.close()  # type: ignore[attr-defined]
    return taken


@pytest.mark.parametrize("count", range(1, 8))
def test_leaving_inside_a_block_keeps_what_was_handed_out(family: str, count: int) -> None:
    twin = new_model(HYBRID if family == "hybrid" else ATTENTION, vocab_size=VOCAB)
    prompt = tokenizer().encode(TEXT)
    cache = make_prompt_cache(target(family))
    stream = draftloom.stream_generate(
        target(family),
        tokenizer(),
        prompt,
        COUNT,
        draft_model=twin,
        num_draft_tokens=4,
        prompt_cache=cache,
    )
    tokens = [response.token for response in take(stream, count)]
    assert same_caches(cache, fresh_cache(target(family), [*prompt, *tokens]))


def test_a_second_turn_over_the_same_cache(family: str) -> None:
    def turns(run: Any) -> list[int]:
        cache = make_prompt_cache(target(family))
        first = run(family, prompt_cache=cache, max_tokens=6)
        second = run(family, " # then", prompt_cache=cache, max_tokens=6)
        return [response.token for response in (*first, *second)]

    assert turns(ours) == turns(theirs)


# --- the models are put back -----------------------------------------------------------------


@pytest.mark.parametrize("end", ["exhausted", "left", "failed", "never begun"])
def test_models_are_put_back_as_they_were(family: str, end: str) -> None:
    models = target(family), new_model(HYBRID, 1, vocab_size=VOCAB)
    before = [structure(model) for model in models]
    options = {"draft_model": models[1]}
    if end == "failed":
        with pytest.raises(UsageError):
            ours(family, [VOCAB + 1], **options)
    else:
        stream = draftloom.stream_generate(models[0], tokenizer(), TEXT, 8, **options)
        if end != "never begun":
            take(stream, 99 if end == "exhausted" else 2)
        stream.close()  # type: ignore[attr-defined]
    assert [structure(model) for model in models] == before
    assert any(kind is GatedDeltaNet for _, kind in before[1])


def test_models_are_not_touched_before_the_first_response() -> None:
    before = structure(target("hybrid"))
    stream = draftloom.stream_generate(target("hybrid"), tokenizer(), TEXT, 8)
    assert structure(target("hybrid")) == before
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert structure(target("hybrid")) == before


# --- decoding parameters ----------------------------------------------------------------------


def last_twice(tokens: mx.array, logits: mx.array) -> mx.array:
    """A processor of the user's own: the last token may not follow itself."""
    return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], -mx.inf, logits)


@pytest.mark.parametrize("drafting", ["prompt-lookup", "draft model", "none"])
def test_logits_processors_are_mlx_lms(family: str, drafting: str) -> None:
    """Its own and the user's, token by token and log-probability by log-probability."""
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {5: 2.0}}
    processors = [*make_logits_processors(**penalties), last_twice]
    # A width of its own: `auto` drafts where that pays, which the clock says.
    more: dict[str, Any] = {"num_draft_tokens": 3}
    if drafting == "draft model":
        more["draft_model"] = draft_model(family)
    if drafting == "none":
        more = {"drafter": "none"}
    expected = theirs(family, logits_processors=processors)
    as_callables = ours(family, logits_processors=processors, **more)
    as_numbers = ours(family, logits_processors=[last_twice], **penalties, **more)
    for found in (as_callables, as_numbers):
        assert_same(found, expected)
        for a, b in zip(found, expected, strict=True):
            assert mx.array_equal(a.logprobs, b.logprobs), "not bit for bit"
    if (drafting, family) == ("prompt-lookup", "attention"):
        longer = ours(family, max_tokens=120, **more)
        assert any(r.from_draft for r in longer), "nothing was drafted"


# --- what cannot be honoured -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": lambda logprobs: logprobs}, "'sampler'"),
        ({"logits_processors": ["x"]}, "a logits processor must be callable, got 'x'"),
        ({"min_tokens_to_keep": 2}, "'min_tokens_to_keep'"),
        ({"xtc_probability": 0.5}, "xtc_probability needs a temperature above 0"),
        ({"logit_bias": {10_000: 1.0}}, "logit_bias names token 10000"),
        ({"max_kv_size": 4}, "'max_kv_size'"),
        ({"temprature": 1.0}, "'temprature'"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prefill_step_size": 0}, "at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        ours("attention", **options)


def test_a_draft_model_of_another_vocabulary() -> None:
    with pytest.raises(GraphError, match="the draft model has 32 tokens, the target 8192"):
        ours("attention", draft_model=new_model(ATTENTION))


def test_an_empty_prompt() -> None:
    for prompt in ("", []):
        with pytest.raises(UsageError, match="the prompt is empty"):
            ours("attention", prompt)


def test_an_unknown_drafter() -> None:
    with pytest.raises(GraphError, match="did you mean 'prompt-lookup'"):
        ours("attention", drafter="prompt-lokup")


# --- load ------------------------------------------------------------------------------------


def test_load_refuses_before_it_loads(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m")
    with pytest.raises(GraphError, match=r"no drafter is known.*|unknown type") as caught:
        draftloom.load(folder, dtype="float3", plugins=plugins())
    assert len(caught.value.problems) == 2
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        draftloom.load(folder, "prompt-lookup", plugins=plugins())
    with pytest.raises(ModelError, match="no model folder"):
        draftloom.load(tmp_path / "nowhere", plugins=plugins())


def test_load_takes_a_folder_that_mlx_lm_can_load(tmp_path: Path) -> None:
    model = new_model(ATTENTION)
    folder = write_config(tmp_path / "m")
    mlx_lm.utils.save_model(folder, model)
    with draftloom.load(folder, "prompt-lookup", plugins=plugins()) as pipeline:
        assert pipeline.tokenizer is None
        tokens = pipeline.generate([1, 2, 3], max_tokens=6).token_ids
    assert tokens == plain(model, [1, 2, 3], 6)
