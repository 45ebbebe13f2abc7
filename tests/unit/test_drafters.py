"""Drafters by themselves: a smaller model, a cascade, the checkpoint's config, nothing at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest

from draftloom import (
    ComponentInfo,
    ComponentSpec,
    Draft,
    DrafterDescription,
    DrafterFallbackWarning,
    DraftLaw,
    DraftRequest,
    GraphError,
    ModelError,
    ModelInfo,
    Need,
    SamplingParams,
    SamplingState,
)
from draftloom.abilities import BindContext
from draftloom.composite import CompositeRollback
from draftloom.drafters.autoregressive import AutoregressiveDrafter
from draftloom.drafters.cascade import CascadeDrafter
from draftloom.drafters.formats import describe_checkpoint
from draftloom.drafters.none import NoDrafter
from draftloom.drafting import all_finite
from draftloom.sampling import target_law

from .fakes import (
    ATTENTION,
    DFLASH,
    HYBRID,
    PROMPT,
    fresh_cache,
    model,
    new_model,
    pipeline_of,
    plain,
    plugins,
    same_caches,
    write_config,
    write_dflash,
)

GREEDY = SamplingState(SamplingParams())
REQUEST = DraftRequest((PROMPT,), GREEDY, 32)
COUNT = 20


def adapted(family: str, seed: int = 0) -> Any:
    """A fresh model behind its adapter."""
    fresh = new_model(HYBRID if family == "hybrid" else ATTENTION, seed)
    info = ModelInfo.from_model(fresh)
    factory = plugins().adapter_for(info).load()
    return factory(fresh, factory.describe(info))


# --- a smaller model -------------------------------------------------------------------------


def session_of(adapter: Any) -> Any:
    """A drafting session over an adapter, bound as the builder binds it."""
    manager = plugins()

    def open_rollback(target: Any) -> Any:
        kinds = set(target.info.cache_kinds)
        made = {
            kind: manager.component("rollback", manager.rollback_for(kind, target.info)).make({})
            for kind in kinds
        }
        return CompositeRollback(made, target).begin

    drafter = AutoregressiveDrafter(adapter)
    drafter.bind(BindContext(adapter, "auto", lambda path: adapter, open_rollback))
    return drafter.open(REQUEST)


@pytest.mark.parametrize("family", ["attention", "hybrid"])
@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
def test_its_caches_follow_the_committed_text(family: str, kept: int) -> None:
    adapter = adapted(family)
    session = session_of(adapter)
    session.observe((PROMPT[:-1],), None)
    text = [*PROMPT[:-1]]
    for _ in range(3):
        expected = plain(adapter.model, [*text, 4], 4)
        draft = session.propose(mx.array([4], dtype=mx.int32), 4, GREEDY)
        assert tuple(draft.tokens.tolist()[0]) == expected
        committed = [4, *expected][:kept]
        session.observe((tuple(committed),), None)
        text += committed
        session._catch_up()
        assert same_caches(session._cache, fresh_cache(adapter.model, text))


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_proposal_nobody_used_is_taken_back(family: str) -> None:
    adapter = adapted(family)
    session = session_of(adapter)
    session.observe((PROMPT,), None)
    anchor = mx.array([3], dtype=mx.int32)
    first = session.propose(anchor, 4, GREEDY).tokens.tolist()
    assert session.propose(anchor, 4, GREEDY).tokens.tolist() == first
    session._catch_up()
    assert same_caches(session._cache, fresh_cache(adapter.model, PROMPT))


def test_committed_tokens_may_outrun_the_proposals() -> None:
    """Another stage of a cascade may have drafted in between."""
    adapter = adapted("attention")
    session = session_of(adapter)
    session.observe((PROMPT,), None)
    session.observe(((8, 6, 3),), None)
    draft = session.propose(mx.array([9], dtype=mx.int32), 3, GREEDY)
    assert tuple(draft.tokens.tolist()[0]) == plain(adapter.model, (*PROMPT, 8, 6, 3, 9), 3)


def test_above_temperature_zero_it_gives_the_law_it_drew_from() -> None:
    adapter = adapted("attention")
    session = session_of(adapter)
    session.observe((PROMPT,), None)
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=4)
    draft = session.propose(mx.array([4], dtype=mx.int32), 3, SamplingState(params))
    assert (draft.law, draft.width) == (DraftLaw.DENSE, 3)
    (tokens,) = draft.tokens.tolist()
    logits = adapter.model(mx.array([[*PROMPT, 4, *tokens[:-1]]]))[:, -3:]
    assert mx.allclose(draft.probs, target_law(logits, params), atol=1e-5).item()
    drawn = mx.take_along_axis(draft.probs, draft.tokens[..., None], axis=-1)
    assert (drawn > 0).all().item(), "no token outside the filters is drawn"


@pytest.mark.parametrize("family", ["attention", "hybrid"])
@pytest.mark.parametrize("drafting", ["attention", "hybrid"])
def test_any_model_drafts_for_any(family: str, drafting: str) -> None:
    with pipeline_of(
        target=model(family),
        configure=lambda b: b.drafter("autoregressive", model=adapted(drafting, 1)).width(3),
    ) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == plain(model(family), PROMPT, COUNT)
    assert result.stats.verified_by_position[2] > 0
    assert not result.stats.fell_back


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_twin_agrees_always(family: str) -> None:
    with pipeline_of(
        target=model(family),
        configure=lambda b: b.drafter("autoregressive", model=adapted(family)).width(3),
    ) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=21)
        sampled = pipeline.generate(PROMPT, max_tokens=21, temperature=1.0, seed=2)
    assert result.stats.acceptance_length == 4.0
    assert sampled.stats.acceptance_rate > 0.95, "p = q: nothing is rejected"


def test_it_cannot_be_opened_before_it_is_bound(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="build the pipeline first"):
        AutoregressiveDrafter(write_config(tmp_path / "m")).open(REQUEST)


# --- cascade ---------------------------------------------------------------------------------


class Stage:
    """A stage that proposes a fixed answer and notes what it is told."""

    def __init__(self, answer: Sequence[int], **info: Any) -> None:
        self.info = ComponentInfo("stage", law=DraftLaw.DETERMINISTIC)
        self.info = attrs.evolve(self.info, **info)
        self._answer = answer
        self.observed: list[tuple[int, ...]] = []
        self.widths: list[int] = []

    def open(self, request: Any) -> Any:
        return self

    def observe(self, committed: Any, features: Any) -> None:
        self.observed.append(tuple(committed[0]))

    def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
        self.widths.append(width)
        if not self._answer:
            return Draft.empty()
        return Draft.deterministic(mx.array([list(self._answer)]), source=self.info.name)


def test_the_first_stage_that_proposes_wins() -> None:
    stages = [Stage([]), Stage([1, 2]), Stage([3])]
    session = CascadeDrafter(stages).open(REQUEST)
    draft = session.propose(mx.array([0]), 4, GREEDY)
    assert draft.tokens.tolist() == [[1, 2]]
    assert [stage.widths for stage in stages] == [[4], [4], []]


def test_nobody_proposes() -> None:
    session = CascadeDrafter([Stage([]), Stage([])]).open(REQUEST)
    assert session.propose(mx.array([0]), 4, GREEDY).width == 0


def test_every_stage_learns_everything() -> None:
    stages = [Stage([1]), Stage([2])]
    session = CascadeDrafter(stages).open(REQUEST)
    session.observe(((5, 6),), None)
    session.propose(mx.array([0]), 4, GREEDY)
    session.observe(((7,),), None)
    assert [stage.observed for stage in stages] == [[(5, 6), (7,)]] * 2


def test_a_stage_is_asked_for_no_more_than_it_can() -> None:
    stages = [Stage([], max_width=2), Stage([], max_width=None), Stage([1], max_width=3)]
    CascadeDrafter(stages).open(REQUEST).propose(mx.array([0]), 8, GREEDY)
    assert [stage.widths for stage in stages] == [[2], [8], [3]]


def test_what_a_cascade_says_of_itself() -> None:
    taps = {"tap_layers": (0, 1), "needs": (Need.TAPS,)}
    info = CascadeDrafter([Stage([], max_width=3), Stage([], max_width=7, **taps)]).info
    assert info.name == "cascade(stage, stage)"
    assert (info.max_width, info.tap_layers, info.needs) == (7, (0, 1), (Need.TAPS,))
    assert info.law is DraftLaw.DETERMINISTIC
    mixed = CascadeDrafter([Stage([], max_width=3), Stage([], law=DraftLaw.DENSE)]).info
    assert (mixed.max_width, mixed.law) == (None, DraftLaw.DENSE)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [([], "at least one stage"), ([(0,), (1,)], "read different layers")],
)
def test_cascades_that_cannot_be(stages: list[Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CascadeDrafter([Stage([], tap_layers=taps) for taps in stages])


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_cascade_of_lookup_and_model(family: str, tmp_path: Path) -> None:
    dflash = str(write_dflash(tmp_path / "d"))
    sources: set[str] = set()
    stages = ["prompt-lookup", {"use": "dflash", "checkpoint": dflash}]
    with pipeline_of(
        target=model(family), configure=lambda b: b.drafter("cascade", stages=stages)
    ) as pipeline:
        result = pipeline.generate(
            PROMPT, max_tokens=COUNT, on_cycle=lambda event: sources.add(event.source)
        )
    assert result.token_ids == plain(model(family), PROMPT, COUNT)
    assert sources >= {"prompt-lookup", "dflash"}
    assert not result.stats.fell_back


def test_stages_may_be_named_configured_or_nested() -> None:
    nested = {"use": "cascade", "stages": ["none", {"use": "prompt-lookup", "max_ngram": 2}]}
    with pipeline_of(
        configure=lambda b: b.drafter("cascade", stages=[nested, ComponentSpec("none")])
    ) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == plain(model(), PROMPT, COUNT)
    assert pipeline.names["drafter"] == "cascade(cascade(none, prompt-lookup), none)"


def test_a_failing_stage_gives_up_the_cascade() -> None:
    class Fails(Stage):
        def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
            raise OSError("gone")

    drafter = CascadeDrafter([Stage([]), Fails([])])
    with pipeline_of(drafter) as pipeline, pytest.warns(DrafterFallbackWarning, match="gone"):
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == plain(model(), PROMPT, COUNT)


# --- dflash ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_random_checkpoint_costs_no_token(family: str, tmp_path: Path) -> None:
    checkpoint = str(write_dflash(tmp_path / "d"))
    with pipeline_of(target=model(family), configure=lambda b: b.drafter(checkpoint)) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
        assert pipeline.names["drafter"] == "dflash"
    assert result.token_ids == plain(model(family), PROMPT, COUNT)
    assert result.stats.verified_by_position[3] > 0
    assert not result.stats.fell_back


def test_a_checkpoint_with_weights_that_are_not_numbers(tmp_path: Path) -> None:
    folder = write_dflash(tmp_path / "d")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    tensors["norm.weight"] = mx.full(tensors["norm.weight"].shape, mx.nan)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(ModelError, match=r"not finite: norm\.weight"):
        pipeline_of(configure=lambda b: b.drafter(str(folder)))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda t: t.pop("fc.weight"), "fc.weight"),
        (lambda t: t.update({"extra.weight": mx.zeros((2,))}), "extra"),
        (lambda t: t.update({"fc.weight": mx.zeros((2, 2))}), "fc.weight"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_name_the_tensor(tmp_path: Path, spoil: Any, expected: str) -> None:
    folder = write_dflash(tmp_path / "d")
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    spoil(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        pipeline_of(configure=lambda b: b.drafter(str(folder)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    folder = write_dflash(tmp_path / "d", weights=False)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        pipeline_of(configure=lambda b: b.drafter(str(folder)))


def described(folder: Path) -> DrafterDescription:
    found = describe_checkpoint(ModelInfo.from_path(folder, "a drafter"))
    assert found is not None
    return found


def config_of(folder: Path, **changes: Any) -> DrafterDescription:
    return described(write_dflash(folder, weights=False, **changes))


def test_old_and_newer_keys_are_read_alike(tmp_path: Path) -> None:
    old = config_of(tmp_path / "old")
    newer = {key: value for key, value in DFLASH.items() if key not in ("block_size",)}
    newer["dflash_config"] = {**DFLASH["dflash_config"], "block_size": DFLASH["block_size"]}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": newer.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    assert attrs.evolve(described(tmp_path), path=old.path) == old
    assert (old.block_size, old.tap_layers, old.mask_token_id) == (5, (0, 1), 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"block_size": "5"}, "block_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, not 1"),
        ({"dflash_config": {"mask_token_id": 3}}, "target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [0]}}, "mask_token_id"),
    ],
)
def test_a_config_that_lacks_something_names_the_key(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelError) as caught:
        config_of(tmp_path, **changes)
    assert expected in str(caught.value)


def test_an_ordinary_model_is_no_dflash_checkpoint(tmp_path: Path) -> None:
    folder = str(write_config(tmp_path / "m"))
    with pytest.raises(GraphError, match=r"not a DFlash checkpoint.*autoregressive"):
        pipeline_of(configure=lambda b: b.drafter("dflash", checkpoint=folder))


# --- none ------------------------------------------------------------------------------------


def test_none_is_plain_decoding() -> None:
    with pipeline_of("none") as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=COUNT)
    assert result.token_ids == plain(model(), PROMPT, COUNT)
    assert (result.stats.cycles, result.stats.drafted) == (COUNT - 1, 0)
    assert pipeline.names["width"] == "fixed 0"
    assert NoDrafter().open(REQUEST).propose(mx.array([1, 2]), 3, GREEDY).tokens.shape == (2, 0)


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_one_number_that_is_none_spoils_its_row(value: float, dtype: mx.Dtype) -> None:
    most = float(mx.finfo(dtype).max)
    hidden = mx.full((3, 4, 33), most).astype(dtype)
    hidden = hidden * mx.where(mx.arange(33) % 2, 1, -1).astype(dtype)
    logits = mx.zeros((3, 5), dtype=mx.float32)
    assert all_finite(hidden, logits).tolist() == [True] * 3
    for row, slot, column in ((0, 0, 0), (1, 3, 32), (2, 1, 7)):
        spoiled = mx.array(hidden)
        spoiled[row, slot, column] = value
        assert all_finite(spoiled, logits).tolist() == [i != row for i in range(3)]
        spoiled = mx.array(logits)
        spoiled[row, slot] = value
        assert all_finite(hidden, spoiled).tolist() == [i != row for i in range(3)]
