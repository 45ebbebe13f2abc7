"""The builder: defaults, every problem at once, and no weight loaded before all is well."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from draftloom import (
    CacheKind,
    ComponentInfo,
    ComponentSpec,
    DraftLaw,
    DraftloomError,
    GraphError,
    ModelError,
    ModelInfo,
    Need,
    Pipeline,
    PipelineBuilder,
    PipelineSpec,
    Port,
    Problem,
    UnsupportedModelError,
    UsageError,
    hookimpl,
)
from draftloom.adapters.attention import AttentionAdapter
from draftloom.adapters.bundled import default_pair
from draftloom.drafters.none import NoDrafter
from draftloom.verifiers.acceptance.greedy import GreedyAcceptance

from .fakes import (
    ATTENTION,
    DFLASH,
    HYBRID,
    PROMPT,
    Offer,
    model,
    new_model,
    pipeline_of,
    plain,
    plugins,
    write_config,
    write_dflash,
)

Builder = PipelineBuilder


@pytest.fixture
def attention(tmp_path: Path) -> str:
    """A pure-attention model folder without weights."""
    return str(write_config(tmp_path / "attention"))


@pytest.fixture
def hybrid(tmp_path: Path) -> str:
    """A hybrid model folder without weights."""
    return str(write_config(tmp_path / "hybrid", HYBRID))


def builder(target: str, *extra: Any) -> Builder:
    return PipelineBuilder(target, plugins=plugins(*extra)).drafter("none")


def problems_of(given: Builder) -> list[str]:
    with pytest.raises(GraphError) as caught:
        given.check()
    assert "\n" not in str(caught.value)
    return [str(problem) for problem in caught.value.problems]


# --- defaults --------------------------------------------------------------------------------


def test_defaults_of_an_attention_model(attention: str) -> None:
    plan = builder(attention).drafter("prompt-lookup").check()
    assert plan.names == {
        "target": attention,
        "adapter": "attention",
        "drafter": "prompt-lookup",
        "verifier": "block",
        "acceptance": "auto",
        "rollback": "trim",
        "width": "auto",
    }
    assert plan.target.cache_kinds == (CacheKind.ATTENTION, CacheKind.ATTENTION)
    assert plan.target.vocab_size == ATTENTION["vocab_size"]
    assert plan.target.context_limit == ATTENTION["max_position_embeddings"]


def test_defaults_of_a_hybrid(hybrid: str) -> None:
    plan = builder(hybrid).check()
    assert plan.names["rollback"] == "tape-replay + trim"
    assert set(plan.rollbacks) == {CacheKind.ATTENTION, CacheKind.GATED_DELTA}


def test_a_mapping_chooses_single_rollbacks(hybrid: str) -> None:
    plan = builder(hybrid).rollback({"gated_delta": "snapshot"}).check()
    names = {kind: rollback.info.name for kind, rollback in plan.rollbacks.items()}
    assert names == {CacheKind.ATTENTION: "trim", CacheKind.GATED_DELTA: "snapshot"}


def test_one_name_serves_every_kind_it_can_and_defaults_the_rest(hybrid: str) -> None:
    assert builder(hybrid).rollback("snapshot").check().names["rollback"] == "snapshot"
    assert builder(hybrid).rollback("trim").check().names["rollback"] == "tape-replay + trim"


def test_the_bundled_target_brings_its_drafter() -> None:
    plan = PipelineBuilder(plugins=plugins()).check()
    assert plan.names["target"] == "python-17m"
    assert plan.names["drafter"] == "dflash"
    assert plan.drafter.info.max_width == 15
    assert plan.names["width"] == "auto"
    assert PipelineBuilder(plugins=plugins()).own_width().check().names["width"] == "fixed 15"


def test_a_drafter_that_is_named_without_checkpoint_gets_the_targets_own() -> None:
    plan = PipelineBuilder(plugins=plugins()).drafter("dflash").check()
    assert plan.drafter.info.max_width == 15


def test_a_checkpoint_folder_finds_its_drafter(attention: str, tmp_path: Path) -> None:
    dflash = write_dflash(tmp_path / "dflash", weights=False)
    assert builder(attention).drafter(str(dflash)).check().names["drafter"] == "dflash"
    small = write_config(tmp_path / "small", num_hidden_layers=1)
    assert builder(attention).drafter(str(small)).check().names["drafter"] == "autoregressive"


def test_what_was_resolved_is_in_the_spec(attention: str, tmp_path: Path) -> None:
    checkpoint = str(write_dflash(tmp_path / "dflash", weights=False))
    plan = builder(attention).drafter(checkpoint).check()
    assert plan.spec.drafter == ComponentSpec.make("dflash", {"checkpoint": checkpoint})
    assert plan.spec.width == ComponentSpec.make("auto", {"default": 4})
    assert PipelineSpec.from_toml(plan.spec.to_toml()) == plan.spec


def test_methods_return_new_builders(attention: str) -> None:
    base = builder(attention)
    changed = base.dtype("float16").width(3).sampling(temperature=0.5).insert("x", after="verify")
    assert base.spec == PipelineSpec(target=attention, drafter=ComponentSpec("none"))
    assert changed.spec == attrs.evolve(
        base.spec,
        dtype="float16",
        width=ComponentSpec.make("fixed", {"tokens": 3}),
        sampling=(("temperature", 0.5),),
        inserts=changed.spec.inserts,
    )
    assert changed.block_size(4).spec.width == changed.spec.width


def test_a_file_builds_what_the_methods_build(attention: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    given = builder(attention).drafter("prompt-lookup", max_ngram=2).width(3).rollback("snapshot")
    path.write_text(given.spec.to_toml(), encoding="utf-8")
    read = PipelineBuilder.from_file(path, plugins=plugins())
    assert read.spec == given.spec
    assert read.check().names == given.check().names


# --- problems --------------------------------------------------------------------------------


def test_all_problems_at_once_and_no_weight_is_loaded(attention: str) -> None:
    """The folder holds a config and nothing else: a loaded weight would be another error."""
    assert [path.name for path in Path(attention).iterdir()] == ["config.json"]
    found = problems_of(
        builder(attention)
        .dtype("float3")
        .drafter("prompt-lookop")
        .verifier("blok")
        .acceptance("gready")
        .rollback("trimm")
        .width("fixxed")
        .sampling(temperature=-1)
        .insert("no-such-node", after="verify")
    )
    assert len(found) == 8
    text = "\n".join(found)
    for nearest in ("float32", "prompt-lookup", "block", "greedy", "trim", "fixed"):
        assert f"did you mean {nearest!r}?" in text
    assert "temperature must be 0 or more" in text
    assert "no node named 'no-such-node'" in text


def test_build_checks_first_and_then_misses_the_weights(attention: str) -> None:
    with pytest.raises(GraphError, match="unknown type"):
        builder(attention).dtype("float3").build()
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        builder(attention).build()


def test_problems_of_every_stage_of_a_cascade(attention: str) -> None:
    found = problems_of(builder(attention).drafter("cascade", stages=["foo-one", "bar-two"]))
    assert [name for name in ("foo-one", "bar-two") if any(name in p for p in found)] == [
        "foo-one",
        "bar-two",
    ]


def test_what_a_component_raises_in_check_is_one_problem_of_several(
    attention: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    given = builder(attention).drafter("autoregressive", model=str(tmp_path / "empty"))
    found = problems_of(given.dtype("float3"))
    assert len(found) == 2
    assert any("has no config.json" in problem for problem in found)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda b: b.dtype("bf16"), "dtype: unknown type 'bf16'"),
        (lambda b: b.drafter("lookup"), "did you mean 'prompt-lookup'?"),
        (lambda b: b.drafter("prompt-lookup", max_ngrm=2), "did you mean 'max_ngram'?"),
        (lambda b: b.drafter("prompt-lookup", max_ngram=0), "1 <= min_ngram <= max_ngram"),
        (lambda b: b.drafter("autoregressive"), "needs the option 'model'"),
        (lambda b: b.drafter("autoregressive", model="/no/where"), "no model folder at /no/where"),
        (lambda b: b.drafter("./no/where"), "no model folder at ./no/where"),
        (lambda b: b.drafter("cascade", stages=[]), "at least one stage"),
        (lambda b: b.drafter("auto"), "no drafter is known for"),
        (lambda b: b.width(-1), "tokens must be a whole number >= 0, got -1"),
        (lambda b: b.width("fixed", tokens=4, verify=5), "verify must be in 0..4, got 5"),
        (lambda b: b.rollback({"atention": "trim"}), "did you mean 'attention'?"),
        (lambda b: b.rollback("tape-replay"), "'tape-replay' serves no cache of this target"),
        (lambda b: b.acceptance("greedy").sampling(temperature=0.5), "temperature is not 0"),
        (lambda b: b.sampling(temprature=1.0), "did you mean 'temperature'?"),
        (lambda b: b.sampling(top_p=0), "top_p must be in (0, 1], got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_problem_is_named(attention: str, change: Any, expected: str) -> None:
    (problem,) = problems_of(change(builder(attention)))
    assert expected in problem


def test_a_rollback_for_the_wrong_kind(attention: str) -> None:
    found = problems_of(builder(attention).rollback({"attention": "tape-replay"}))
    assert [problem.partition(" (")[0] for problem in found] == [
        "rollback: 'tape-replay' cannot take back attention caches",
        "tape-replay: needs a tape, which no layer can record",
    ]


@pytest.mark.parametrize("size", [0, -3, True, 2.5])
def test_block_sizes_that_make_no_sense(attention: str, size: Any) -> None:
    with pytest.raises(UsageError, match="block size must be at least 1"):
        builder(attention).block_size(size)


@pytest.mark.parametrize("places", [{}, {"after": "verify", "before": "accept"}])
def test_insert_needs_one_place(attention: str, places: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="one of after= and before="):
        builder(attention).insert("x", **places)


# --- drafters that do not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"dflash_config": {"target_layer_ids": [0, 7, 9], "mask_token_id": 3}},
            "reads layers [7, 9], the target has 2",
        ),
        ({"vocab_size": 99}, "made for vocab_size 99, the target has 32"),
        ({"hidden_size": 64}, "made for hidden_size 64, the target has 32"),
        ({"num_target_layers": 8}, "made for num_target_layers 8, the target has 2"),
        (
            {"dflash_config": {"target_layer_ids": [0, 1], "mask_token_id": 40}},
            "mask_token_id 40 is outside",
        ),
    ],
)
def test_a_drafter_of_another_target(
    attention: str, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    checkpoint = write_dflash(tmp_path / "dflash", weights=False, **changes)
    (problem,) = problems_of(builder(attention).drafter("dflash", checkpoint=str(checkpoint)))
    assert expected in problem


def test_all_that_does_not_fit_is_listed(attention: str, tmp_path: Path) -> None:
    taps = {"target_layer_ids": [5], "mask_token_id": 60}
    checkpoint = write_dflash(
        tmp_path / "d", weights=False, vocab_size=64, hidden_size=48, dflash_config=taps
    )
    text = "\n".join(problems_of(builder(attention).drafter(str(checkpoint)).block_size(9)))
    for part in ("vocab_size 64", "hidden_size 48", "mask_token_id 60", "layers [5]", "size 9"):
        assert part in text


def test_a_width_above_the_drafters_limit(attention: str, tmp_path: Path) -> None:
    checkpoint = str(write_dflash(tmp_path / "dflash", weights=False))
    given = builder(attention).drafter(checkpoint)
    assert given.block_size(DFLASH["block_size"]).check().names["width"] == "fixed 4"
    (problem,) = problems_of(given.block_size(6))
    assert "block size 6 is above the drafter's 5" in problem


def test_a_draft_model_of_another_vocabulary(attention: str, tmp_path: Path) -> None:
    small = write_config(tmp_path / "small", vocab_size=40)
    (problem,) = problems_of(builder(attention).drafter("autoregressive", model=str(small)))
    assert "the draft model has 40 tokens, the target 32" in problem


def test_stages_of_a_cascade_are_checked_too(attention: str, tmp_path: Path) -> None:
    small = write_config(tmp_path / "small", vocab_size=40)
    stages = ["prompt-lookup", {"use": "autoregressive", "model": str(small)}]
    (problem,) = problems_of(builder(attention).drafter("cascade", stages=stages))
    assert "the draft model has 40 tokens" in problem


# --- needs -----------------------------------------------------------------------------------


class NoTaps(AttentionAdapter):
    """An adapter whose targets give no hidden states and whose layers record nothing."""

    @classmethod
    def claims(cls, model: ModelInfo) -> bool:
        return True

    @classmethod
    def describe(cls, model: ModelInfo) -> Any:
        info = super().describe(model)
        kinds = (CacheKind.GATED_DELTA, CacheKind.RECURRENT)
        return attrs.evolve(info, adapter="my-lab.no-taps", can_tap=False, cache_kinds=kinds)


def test_taps_and_a_tape_that_the_adapter_cannot_give(attention: str, tmp_path: Path) -> None:
    checkpoint = str(write_dflash(tmp_path / "dflash", weights=False))
    given = builder(attention, Offer(adapter={"my-lab.no-taps": NoTaps})).drafter(checkpoint)
    assert problems_of(given) == [
        "dflash: needs hidden states, adapter 'my-lab.no-taps' has no taps"
    ]
    found = problems_of(given.rollback({"gated-delta": "tape-replay"}))
    assert len(found) == 2
    assert found[0].startswith("tape-replay: needs a tape, which no layer can record")


class WantsLaw(GreedyAcceptance):
    info = ComponentInfo("my-lab.wants-law", needs=(Need.DRAFT_PROBS,))


def test_a_policy_that_needs_the_drafts_law(attention: str, tmp_path: Path) -> None:
    small = str(write_config(tmp_path / "small"))
    given = builder(attention, Offer(acceptance={"my-lab.wants-law": WantsLaw}))
    given = given.acceptance("my-lab.wants-law")
    (problem,) = problems_of(given.drafter("prompt-lookup"))
    assert problem == "my-lab.wants-law: needs q, drafter 'prompt-lookup' has none"
    assert given.drafter("autoregressive", model=small).check().drafter.info.law is DraftLaw.DENSE


def test_no_rollback_for_a_kind_of_cache(attention: str) -> None:
    class OtherKind(NoTaps):
        @classmethod
        def describe(cls, model: ModelInfo) -> Any:
            return attrs.evolve(super().describe(model), cache_kinds=(CacheKind.ATTENTION,) * 2)

    class Nobody:
        @hookimpl
        def resolve_cache_rollback(self, cache_kind: CacheKind, target: Any) -> str:
            return "trim"

    given = builder(attention, Offer(adapter={"my-lab.no-taps": NoTaps}), Nobody())
    found = problems_of(given)
    assert [p.partition(" (")[0] for p in found] == [
        "rollback: 'trim' cannot take back gated-delta caches",
        "rollback: 'trim' cannot take back recurrent caches",
    ]


class Fussy(NoDrafter):
    """Sees two problems of its own."""

    info = ComponentInfo("my-lab.fussy")

    def check(self, target: Any) -> Any:
        yield Problem("my-lab.fussy", f"does not like {target.model_type}")
        yield Problem("my-lab.fussy", "nor anything else")


def test_components_may_object(attention: str) -> None:
    given = builder(attention, Offer(drafter={"my-lab.fussy": Fussy})).drafter("my-lab.fussy")
    assert problems_of(given) == [
        "my-lab.fussy: does not like qwen3",
        "my-lab.fussy: nor anything else",
    ]


# --- the target ------------------------------------------------------------------------------


def test_a_model_that_no_adapter_claims(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", model_type="mamba9")
    with pytest.raises(UnsupportedModelError, match=r"'mamba9' of .*asked: .*attention"):
        builder(str(folder)).check()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ("[]", "has no model_type"),
        ('{"model_type": "qwen3"}', "config.json lacks 'hidden_size', "),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, config: str | None, expected: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        builder(str(tmp_path)).check()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# --- inserted nodes --------------------------------------------------------------------------


class Probe:
    info = ComponentInfo("my-lab.probe", inputs=(Port("logits"),))

    def __call__(self, logits: Any) -> None: ...


class Wants(Probe):
    info = ComponentInfo("my-lab.wants", inputs=(Port("entropy"),))


def test_inserted_nodes_are_part_of_the_graph(attention: str) -> None:
    given = builder(attention, Offer(node={"my-lab.probe": Probe}))
    given = given.insert("my-lab.probe", after="verify").insert("my-lab.probe", before="accept")
    plan = given.check()
    assert [n for n in plan.graph.names if "probe" in n] == ["my-lab.probe", "my-lab.probe#2"]
    assert set(plan.nodes) == {"my-lab.probe", "my-lab.probe#2"}
    assert "+my-lab.probe#2" in plan.graph.describe()


def test_wiring_and_places_are_checked_with_the_rest(attention: str) -> None:
    given = builder(attention, Offer(node={"my-lab.probe": Probe, "my-lab.wants": Wants}))
    given = given.insert("my-lab.wants", after="verify").insert("my-lab.probe", after="verfy")
    found = problems_of(given.insert("my-lab.probe", before="draft").dtype("float3"))
    assert len(found) == 4
    text = "\n".join(found)
    assert "reads port 'entropy', which no node produces" in text
    assert "no node named 'verfy' to insert at (did you mean 'verify'?" in text
    assert "reads port 'logits', which node 'verify' produces later" in text


def test_places_are_checked_where_a_component_is_missing(attention: str) -> None:
    given = builder(attention, Offer(node={"my-lab.probe": Probe})).drafter("nobody")
    text = "\n".join(problems_of(given.insert("my-lab.probe", after="verfy")))
    assert "no drafter named 'nobody'" in text
    assert "no node named 'verfy'" in text


# --- building --------------------------------------------------------------------------------


class Bound(NoDrafter):
    info = ComponentInfo("my-lab.bound")

    def __init__(self) -> None:
        self.contexts: list[Any] = []

    def bind(self, context: Any) -> None:
        self.contexts.append(context)


def test_components_are_bound_once_to_the_target() -> None:
    part = Bound()
    with pipeline_of(part, configure=lambda b: b.dtype("float32")) as pipeline:
        (context,) = part.contexts
        assert context.target.info == pipeline.target
        assert context.dtype == "float32"
        assert callable(context.open_rollback(context.target))


def test_a_component_that_fails_to_bind_leaves_the_model_as_it_was() -> None:
    class Fails(Bound):
        def bind(self, context: Any) -> None:
            context.target.tap((0, 1))
            raise ModelError("no weights here")

    target = model("hybrid")
    before = [type(layer) for layer in target.layers], type(target.layers[0].linear_attn)
    with pytest.raises(ModelError, match="no weights here"):
        pipeline_of(Fails(), target=target)
    assert ([type(layer) for layer in target.layers], type(target.layers[0].linear_attn)) == before


def test_a_model_in_use_is_refused() -> None:
    """Until the first pipeline is closed, its hybrid's layers are stood in for."""
    target = new_model(HYBRID)
    with pipeline_of(target=target):
        wrapped = [type(layer.linear_attn) for layer in target.layers if layer.is_linear]
        with pytest.raises(DraftloomError):
            pipeline_of(target=target)
        assert [type(la.linear_attn) for la in target.layers if la.is_linear] == wrapped
    with pipeline_of(target=target) as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=3).token_ids == plain(target, PROMPT, 3)


def test_a_pipeline_describes_itself() -> None:
    with pipeline_of("prompt-lookup") as pipeline:
        text = pipeline.describe()
        assert isinstance(pipeline, Pipeline)
    for part in ("qwen3", "attention", "prompt-lookup", "block", "trim", "fixed 8"):
        assert part in text


def test_the_bundled_pairs_folder_is_a_target_like_any_other() -> None:
    plan = PipelineBuilder(default_pair().target, plugins=plugins()).check()
    assert plan.names["drafter"] == "dflash", "it is known by its folder too"


def test_a_model_in_memory_is_used_as_it_is() -> None:
    with pipeline_of() as pipeline:
        assert pipeline.model is model()
        assert pipeline.generate(PROMPT, max_tokens=5).token_ids == plain(model(), PROMPT, 5)
