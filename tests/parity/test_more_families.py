"""Further families against stock mlx-lm: taps, logits, head and embeddings, bit-equal on the CPU.

"Stock" is a second model with the same weights. What goes into and out of its layers is Recorded
by the test's own means; each layer must take what the one before it gave, so that the Recorded
outputs are the hidden states after the residual add.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from draftloom.adapters import attention
from draftloom.adapters.generic import REFUSED
from draftloom.adapters.parts import Parts
from draftloom.contracts import TargetAdapter
from draftloom.errors import UnsupportedModelError, UsageError
from draftloom.model_info import ModelInfo
from tests.support import models, pipelines
from tests.support.families_more import (
    GENERIC,
    MORE,
    RECURRENT,
    Recorded,
    adapted,
    new_model,
)

PASSES = (12, 5, 1, 1, 7, 1)


def equal(ours: mx.array, theirs: mx.array) -> bool:
    """Bit for bit."""
    return ours.dtype == theirs.dtype and bool(mx.array_equal(ours, theirs))


def check(target: TargetAdapter, stock: nn.Module, rows: int) -> None:
    """Everything an adapter gives, over one cache: a prefill, blocks, single steps."""
    layers = range(target.info.num_layers)
    target.tap([*reversed(layers)])
    rng = np.random.default_rng(3)
    parts = Parts.of(stock)
    assert parts is not None
    stock_run = Recorded(stock, parts.owners[-1], parts.name, parts.norm)
    ours, theirs, plain = target.make_cache(), make_prompt_cache(stock), make_prompt_cache(stock)
    for count in PASSES:
        tokens = mx.array(rng.integers(models.VOCAB, size=(rows, count)))
        output = target.forward(tokens, ours)
        logits = stock(tokens, cache=plain)
        assert equal(stock_run.run(tokens, theirs), logits), "recording changes the model"
        *runs, (normed_of, normed) = stock_run.seen
        assert len(runs) == len(layers)
        for (_, gave), (given, _) in zip(runs, [*runs[1:], (normed_of, None)], strict=True):
            assert equal(given, gave), "a layer does not follow the one before it"
        assert equal(output.logits, logits), f"logits of {count} tokens"
        outputs = [gave for _, gave in reversed(runs)]
        assert output.features is not None
        assert equal(output.features, mx.concatenate(outputs, axis=-1)), "features"
        assert equal(target.embed(tokens), runs[0][0]), "embeddings"
        assert equal(target.head(normed), logits), "head"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", MORE)
def test_taps_logits_head_and_embeddings_equal_mlx_lms(name: str, rows: int) -> None:
    family = MORE[name]
    with adapted(family) as target:
        assert target.info.adapter == "attention"
        check(target, new_model(family), rows)


@pytest.mark.parametrize("name", GENERIC | RECURRENT)
def test_a_generic_target_gives_what_it_offers(name: str) -> None:
    """Logits always; hidden states where the description says so, otherwise a refusal."""
    family = (GENERIC | RECURRENT)[name]
    with adapted(family) as target:
        assert target.info.adapter == ("recurrent" if name in RECURRENT else "generic")
        assert len(target.make_cache()) == len(target.info.cache_kinds)
        if target.info.can_tap:
            check(target, new_model(family), 1)
            return
        tokens = mx.array([[1, 2, 3]])
        stock = new_model(family)
        theirs = stock(tokens, cache=make_prompt_cache(stock))
        output = target.forward(tokens, target.make_cache())
        assert equal(output.logits, theirs)
        assert output.features is None
        hidden = mx.zeros((1, 1, models.HIDDEN))
        for ask in (lambda: target.tap((0,)), lambda: target.embed(tokens),
                    lambda: target.head(hidden)):  # fmt: skip
            with pytest.raises(UsageError, match=r"models cannot be taken: [ai]"):
                ask()
        if name == "gpt2":
            assert "embeddings depend on more than the token" in target.info.why_no_taps


def test_every_further_model_type_is_tested_here() -> None:
    tested = {family.model_type for family in MORE.values()}
    assert set(attention.FURTHER_MODEL_TYPES) <= tested
    assert not set(attention.FURTHER_MODEL_TYPES) & set(attention.MODEL_TYPES)


@pytest.mark.parametrize("name", MORE)
def test_description_tells_the_model(name: str) -> None:
    model = new_model(MORE[name])
    info = ModelInfo.from_model(model)
    described = pipelines.plugins().adapter_for(info).load().describe(info)
    parts: Any = Parts.of(model)
    assert described.num_layers == len(parts.layers)
    assert (described.vocab_size, described.hidden_size) == (models.VOCAB, models.HIDDEN)
    assert described.can_tap
    assert len(described.cache_kinds) == len(make_prompt_cache(model))


@pytest.mark.parametrize(
    ("name", "limit"), [("gpt2", 128), ("kimi_linear", 512), ("mistral3", 512), ("cohere", None)]
)
def test_the_context_limit_has_many_names(name: str, limit: int | None) -> None:
    with adapted((MORE | GENERIC | RECURRENT)[name]) as target:
        assert target.info.context_limit == limit


@pytest.mark.parametrize("name", ["gemma4", "granite", "gpt_oss", "mamba2"])
def test_close_puts_the_same_layers_back(name: str) -> None:
    model = new_model((MORE | GENERIC | RECURRENT)[name])
    parts: Any = Parts.of(model)
    modules = dict(model.named_modules())
    with pipelines.adapter(model, (0, 1)) as target:
        target.forward(mx.array([[1, 2]]), target.make_cache())
        target.embed(mx.array([[1, 2]]))
        target.head(mx.zeros((1, 2, models.HIDDEN)))
        assert parts.layers[0] is not modules[_path(parts)]
    after = dict(model.named_modules())
    assert [path for path in modules if after.get(path) is not modules[path]] == []
    assert list(after) == list(modules)


def _path(parts: Any) -> str:
    return ".".join([*parts.path, parts.name, "0"])


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", [name for name in REFUSED if importlib.util.find_spec(f"mlx_lm.models.{name}")]
)
def test_a_model_that_cannot_be_served_is_refused_in_one_line(model_type: str) -> None:
    info = ModelInfo("some/model", None, {"model_type": model_type})
    factory = pipelines.plugins().adapter_for(info).load()
    with pytest.raises(UnsupportedModelError, match="cannot be served: its forward") as caught:
        factory.describe(info)
    assert "write-an-adapter.md" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["no_such_model", "../evil", "base.x", ""])
def test_what_mlx_lm_does_not_know_is_claimed_by_nobody(model_type: str) -> None:
    info = ModelInfo("some/model", None, {"model_type": model_type})
    with pytest.raises(UnsupportedModelError, match=r"asked: .*generic"):
        pipelines.plugins().adapter_for(info)


def test_a_model_that_is_not_a_language_model_is_refused_with_its_reason() -> None:
    config = dict(MORE["phi"].config) | {"partial_rotary_factor": 0.4}
    info = ModelInfo("some/model", None, config)
    factory = pipelines.plugins().adapter_for(info).load()
    with pytest.raises(UnsupportedModelError, match=r"does not run as .*: .* even"):
        factory.describe(info)
