"""Checkpoint formats: how each is recognised, what is refused, and what is said about the rest."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom import (
    CandidateSelector,
    CheckpointWarning,
    DrafterDescription,
    DynamicConvolution,
    GraphError,
    ModelError,
    ModelInfo,
    PipelineBuilder,
    PluginManager,
    UnsupportedModelError,
    WindowRule,
    hookimpl,
)
from draftloom.drafters.dspark import DSparkDrafter
from draftloom.drafters.formats import describe_checkpoint
from draftloom.drafters.formats.speculators import QWEN3_DEFAULTS
from tests.support.checkpoints import FORMATS, Golden, rewrite, write

from .fakes import VOCAB, model, plugins

HIDDEN = 32
PLAIN = Golden(hidden=HIDDEN, vocab=VOCAB, taps=(0, 1))
SPARK = Golden(
    hidden=HIDDEN, vocab=VOCAB, taps=(0, 1), first_slot=0, markov="vanilla", confidence=True
)
REDUCED = Golden(hidden=HIDDEN, vocab=VOCAB, taps=(0, 1), draft_ids=tuple(range(0, VOCAB, 3)))
FOLDERS = {
    "z-lab-old": PLAIN,
    "z-lab-new": PLAIN,
    "specforge": SPARK,
    "dspark": SPARK,
    "speculators": REDUCED,
}


def described(folder: Path) -> DrafterDescription:
    found = describe_checkpoint(ModelInfo.from_path(folder))
    assert found is not None
    return found


def build(folder: Path, **options: Any) -> Any:
    builder = PipelineBuilder(plugins=plugins()).own_width().model(model())
    if options:
        return builder.drafter(described(folder).drafter, checkpoint=str(folder), **options).build()
    return builder.drafter(str(folder)).build()


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_the_format_and_the_drafter_are_recognised(form: str, tmp_path: Path) -> None:
    found = described(write(tmp_path, form, FOLDERS[form]))
    assert found.format == form.removesuffix("-old").removesuffix("-new")
    assert found.drafter == ("dspark" if FOLDERS[form].markov else "dflash")
    assert found.tap_layers == (0, 1)
    rule = WindowRule.BLOCK if form == "speculators" else WindowRule.QUERY
    assert (found.window_rule, found.unread) == (rule, ())
    manager = PluginManager(entry_points=False)
    info = ModelInfo.from_path(tmp_path, "a name")
    spec = manager.drafter_for_checkpoint(info)
    assert (spec.use, spec.options) == (found.drafter, (("checkpoint", "a name"),))


def test_a_speculators_file_holds_what_differs_from_a_default_qwen3(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.Qwen3Config().to_dict()
    theta = defaults.pop("rope_parameters")["rope_theta"]
    assert {key: {**defaults, "rope_theta": theta}[key] for key in QWEN3_DEFAULTS} == {
        **QWEN3_DEFAULTS
    }
    golden = Golden(config={"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1})
    folder = write(tmp_path, "speculators", golden)
    assert '"head_dim"' not in (folder / "config.json").read_text()
    assert described(folder).head_dim == 128


def test_dflash2_keys_are_read_in_both_layouts(tmp_path: Path) -> None:
    keys = {
        "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 4, "selector_top_k": 8,
    }  # fmt: skip

    def zlab(config: dict[str, Any]) -> None:
        config["architectures"] = ["DFlash2DraftModel"]
        config["dflash_config"] |= keys

    def speculators(config: dict[str, Any]) -> None:
        config.update(keys, speculators_model_type="dflash2")

    for form, change in (("z-lab-new", zlab), ("speculators", speculators)):
        folder = rewrite(write(tmp_path / form, form, PLAIN), change)
        found = described(folder)
        assert found.drafter == "dflash2"
        assert found.convolution == DynamicConvolution(kernel_size=2, group_size=16)
        assert found.selector == CandidateSelector(rank=4, top_k=8)
        assert found.unread == ()
        rewrite(
            folder,
            lambda c: (
                c.pop("selector_rank", 0),
                c.get("dflash_config", {}).pop("selector_rank", 0),
            ),
        )
        with pytest.raises(ModelError, match=r"config\.json: config lacks selector_rank"):
            described(folder)


def test_a_third_partys_format_is_asked_first(tmp_path: Path) -> None:
    """A format of its own: other keys, other tensor names, the same drafter."""

    class Format:
        @hookimpl
        def read_drafter_checkpoint(self, model: ModelInfo) -> DrafterDescription | None:
            import attrs

            if "my_lab" not in model.config:
                return None
            found = describe_checkpoint(attrs.evolve(model, config=model.config["my_lab"]))
            assert found is not None
            return attrs.evolve(found, format="my-lab", renames=(("net.", ""),))

    def wrap(config: dict[str, Any]) -> None:
        inner = dict(config)
        config.clear()
        config.update(model_type="my-lab", my_lab=inner)

    def prefix(tensors: dict[str, mx.array]) -> None:
        renamed = {"net." + name: value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    folder = rewrite(write(tmp_path, "z-lab-old", PLAIN), wrap, prefix)
    manager = plugins(Format())
    builder = PipelineBuilder(plugins=manager).own_width().model(model()).drafter(str(folder))
    with builder.build() as pipeline:
        assert pipeline.names["drafter"] == "dflash"
        assert "format my-lab" in pipeline.describe()
        assert pipeline.generate((1, 2), max_tokens=4).stats.drafted
    rewrite(folder, tensors=lambda t: t.pop("net.fc.weight"))
    with pytest.raises(ModelError, match=r"tensor fc\.weight missing"):
        builder.build()


@pytest.mark.parametrize(
    ("said", "proposed", "first"),
    [
        (None, 8, 0),
        (None, 7, 1),
        (None, None, 0),
        (None, 3, 0),
        (True, 7, 0),
        (True, 8, 0),
        (False, 7, 1),
        (False, None, 1),
    ],
)
def test_the_first_slot_of_speculators_files(
    said: bool | None, proposed: int | None, first: int, tmp_path: Path
) -> None:
    """Older files have no `sample_from_anchor`: the number of proposed tokens says it."""

    def change(config: dict[str, Any]) -> None:
        config.pop("sample_from_anchor", None)
        if said is not None:
            config["sample_from_anchor"] = said
        if proposed is not None:
            method = {"proposal_type": "greedy", "speculative_tokens": proposed}
            config["speculators_config"]["proposal_methods"] = [method]

    found = described(rewrite(write(tmp_path, "speculators", SPARK), change))
    assert (found.first_slot, found.max_width) == (first, 8 - first)


def test_proposed_tokens_that_contradict_the_anchor_convention(tmp_path: Path) -> None:
    folder = write(tmp_path, "speculators", SPARK)
    rewrite(folder, put("sample_from_anchor", value=False))
    methods = [{"speculative_tokens": 8}]
    rewrite(folder, put("speculators_config", "proposal_methods", value=methods))
    with pytest.raises(ModelError, match=r"sample_from_anchor is false.*8 tokens of a block of 8"):
        described(folder)


def test_dspark_files_in_other_wrappings(tmp_path: Path) -> None:
    """Own architectures, ids in `dflash_config`, a draft vocabulary that is the whole one."""

    def change(config: dict[str, Any]) -> None:
        config["architectures"] = ["Lfm2DSparkDraftModel"]
        inner = {key: config.pop(key) for key in ("target_layer_ids", "mask_token_id")}
        config |= {"dflash_config": inner, "draft_vocab_size": VOCAB, "has_lm_head": False}
        config["projector_type"] = "dspark"

    plain = described(write(tmp_path, "dspark", SPARK))
    assert described(rewrite(tmp_path, change)) == plain
    assert plain.draft_vocab_size is None


# --- keys ------------------------------------------------------------------------------------


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


LAYER = "transformer_layer_config"
BAD: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("z-lab-old", drop("block_size"), "config lacks block_size"),
    ("z-lab-old", drop("dflash_config", "target_layer_ids"), "config lacks target_layer_ids"),
    ("z-lab-new", drop("dflash_config", "mask_token_id"), "config lacks mask_token_id"),
    ("z-lab-old", put("attention_bias", value=True), "attention_bias True is not served"),
    ("z-lab-old", put("hidden_act", value="gelu"), "hidden_act 'gelu' is not served"),
    ("z-lab-old", put("layer_types", value=["sliding_attention"] * 2), "lacks sliding_window"),
    ("z-lab-old", put("layer_types", value=["chunked"] * 2), "layer_types 'chunked'"),
    ("z-lab-old", put("is_causal", value="no"), "is_causal must be true or false"),
    ("z-lab-old", put("rms_norm_eps", value="tiny"), "rms_norm_eps must be a number"),
    ("z-lab-old", put("quantization_config", value={"quant_method": "fp8"}), "'fp8' is not served"),
    (
        "z-lab-new", put("dflash_config", "query_bias", value=0.5),
        "dflash_config.query_bias = 0.5 is not known to format z-lab",
    ),
    ("specforge", put("dflash_config", "projector_type", value="domino"), "'domino' is not served"),
    ("specforge", put("dflash_config", "shift_label", value=True), "shift_label True"),
    ("specforge", put("dflash_config", "pure_draft_prefix_len", value=1), "prefix_len 1 is not"),
    ("specforge", put("dflash_config", "markov_head_type", value="lstm"), "head_type 'lstm'"),
    ("dspark", put("sample_from_anchor", value="yes"), "sample_from_anchor must be true or false"),
    ("dspark", put("sample_from_anchor", value=1), "sample_from_anchor must be true or false"),
    ("dspark", put("model_type", value="gemma4"), "model_type 'gemma4' is not served"),
    ("dspark", put("attention_sink_bias", value=True), "attention_sink_bias True is not served"),
    ("dspark", put("projector_type", value="domino"), "projector_type 'domino' is not served"),
    ("dspark", put("rope_is_neox_style", value=0), "rope_is_neox_style must be true or false"),
    ("dspark", put("markov_rank", value=0), "confidence_head_with_markov needs a markov_rank"),
    ("speculators", drop("mask_token_id"), "config lacks mask_token_id"),
    ("speculators", drop("aux_hidden_state_layer_ids"), "lacks aux_hidden_state_layer_ids"),
    (
        "speculators", put("aux_hidden_state_layer_ids", value=[0, 1]),
        "aux_hidden_state_layer_ids [0, 1] is not served",
    ),
    ("speculators", put("sample_from_anchor", value="true"), "sample_from_anchor must be"),
    ("speculators", put("speculators_model_type", value="eagle3"), "'eagle3' is not served"),
    ("speculators", put("target_hidden_size", value=99), "target_hidden_size 99 is not served"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "says"), BAD, ids=[b[2][:40] for b in BAD])
def test_a_key_of_no_use_is_named_with_its_file(
    form: str, change: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    folder = rewrite(write(tmp_path, form, FOLDERS[form]), change)
    with pytest.raises(ModelError) as caught:
        described(folder)
    assert says in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_config_of_another_model_has_no_qwen3_defaults(tmp_path: Path) -> None:
    golden = Golden(config={"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1})
    folder = write(tmp_path, "speculators", golden)
    rewrite(folder, put(LAYER, "model_type", value="llama"))
    rewrite(folder, drop(LAYER, "intermediate_size"))
    with pytest.raises(ModelError, match="config lacks intermediate_size"):
        described(folder)


def test_the_confidence_threshold_is_checked(tmp_path: Path) -> None:
    spark = write(tmp_path / "spark", "dspark", SPARK)
    for wrong in (-0.1, 1.0, "half"):
        with pytest.raises(ModelError.__base__, match=r"confidence_threshold must be in \[0, 1\)"):
            DSparkDrafter(spark, confidence_threshold=wrong)  # type: ignore[arg-type]
    bare = write(tmp_path / "bare", "dspark", Golden(markov="vanilla"))
    assert DSparkDrafter(bare).description.confidence is None
    with pytest.raises(ModelError.__base__, match="has no confidence head"):
        DSparkDrafter(bare, confidence_threshold=0.5)


def test_a_checkpoint_for_another_drafter_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, "dspark", SPARK)
    builder = PipelineBuilder(plugins=plugins()).own_width().model(model())
    with pytest.raises(GraphError, match=r"for the drafter 'dspark', not for 'dflash'"):
        builder.drafter("dflash", checkpoint=str(folder)).check()


def test_a_drafter_that_nobody_registers_is_named(tmp_path: Path) -> None:
    class Format:
        @hookimpl
        def read_drafter_checkpoint(self, model: ModelInfo) -> DrafterDescription:
            import attrs

            return attrs.evolve(described(folder), drafter="my-lab.drafter")

    folder = write(tmp_path, "z-lab-old", PLAIN)
    builder = PipelineBuilder(plugins=plugins(Format())).own_width().model(model())
    with pytest.raises(GraphError, match=r"'my-lab\.drafter', which nobody registers"):
        builder.drafter(str(folder)).check()


def test_keys_that_nobody_knows_are_said_once_when_the_weights_are_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, "z-lab-old", PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(folder).close()
    rewrite(folder, put("curriculum", value="slow"))
    with pytest.warns(CheckpointWarning, match=r"does not know were not read: curriculum") as said:
        pipeline = build(folder)
    assert len(said) == 1
    assert "keys not read: curriculum" in pipeline.describe()
    pipeline.close()


# --- tensors ---------------------------------------------------------------------------------


def spoil(name: str, change: Callable[[mx.array], Any]) -> Callable[[dict[str, mx.array]], None]:
    def spoilt(tensors: dict[str, mx.array]) -> None:
        tensors[name] = change(tensors[name])

    return spoilt


def shift(index: int, by: int) -> Callable[[mx.array], mx.array]:
    def shifted(offsets: mx.array) -> mx.array:
        values = offsets.tolist()
        values[index] += by  # type: ignore[operator,index]
        return mx.array(values, dtype=mx.int64)

    return shifted


TENSORS: list[tuple[str, Callable[[dict[str, mx.array]], Any], tuple[str, ...]]] = [
    ("z-lab-old", lambda t: t.pop("norm.weight"), ("tensor norm.weight missing",)),
    (
        "z-lab-old",
        lambda t: t.update({"layers.0.self_attn.q_proj.bias": mx.zeros((32,))}),
        ("format z-lab does not know tensor layers.0.self_attn.q_proj.bias",),
    ),
    (
        "z-lab-old",
        spoil("layers.1.mlp.up_proj.weight", lambda w: w[:-1]),
        ("tensor layers.1.mlp.up_proj.weight is (39, 32), not (40, 32)",),
    ),
    ("z-lab-old", spoil("fc.weight", lambda w: w * mx.nan), ("not finite: fc.weight",)),
    (
        "specforge",
        lambda t: t.pop("logit_head.markov_head.markov_w2.weight"),
        ("tensor markov_head.markov_w2.weight missing",),
    ),
    (
        "specforge",
        spoil("logit_head.confidence_head.proj.weight", lambda w: w[:, :-1]),
        ("tensor logit_head.confidence_head.proj.weight is (1, 37), not (1, 38)",),
    ),
    ("speculators", lambda t: t.pop("d2t"), ("tensor d2t missing, draft_vocab_size is",)),
    ("speculators", lambda t: t.pop("lm_head.weight"), ("tensor lm_head.weight missing",)),
    ("speculators", spoil("d2t", lambda d: d[:-1]), ("tensor d2t is",)),
    (
        "speculators",
        spoil("d2t", shift(-1, 500)),
        ("model.safetensors: d2t maps draft token", "outside the target's vocabulary of"),
    ),
    (
        "speculators",
        spoil("d2t", shift(0, -1)),
        ("model.safetensors: d2t maps draft token 0 to -1, outside",),
    ),
    ("speculators", spoil("d2t", shift(1, -3)), ("d2t maps two draft tokens to 0",)),
    (
        "speculators",
        spoil("d2t", shift(1, 1)),
        ("t2d and d2t disagree: t2d marks target token 3, d2t leaves it out",),
    ),
    ("speculators", spoil("t2d", lambda t: t[:-1]), ("tensor t2d is",)),
]


@pytest.mark.parametrize(("form", "change", "says"), TENSORS, ids=[t[2][0][:40] for t in TENSORS])
def test_tensors_that_do_not_fit_are_named(
    form: str, change: Callable[[dict[str, mx.array]], Any], says: tuple[str, ...], tmp_path: Path
) -> None:
    folder = rewrite(write(tmp_path, form, FOLDERS[form]), tensors=change)
    with pytest.raises(ModelError) as caught:
        build(folder)
    for words in says:
        assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def sharded(folder: Path) -> Path:
    """The weights in two files, with an index."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(tensors)}
    for file in {*names.values()}:
        part = {name: value for name, value in tensors.items() if names[name] == file}
        mx.save_safetensors(str(folder / file), part)
    text = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = sharded(write(tmp_path, "speculators", REDUCED))
    build(folder).close()
    second = folder / "model-2-of-2.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(folder)
    second.unlink()
    with pytest.raises(ModelError, match=r"index\.json names model-2-of-2\.safetensors, which is"):
        build(folder)
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        build(folder)


def test_a_pipeline_file_names_the_threshold(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", "dspark", SPARK)
    file = tmp_path / "p.toml"
    text = f'[drafter]\nuse = "dspark"\ncheckpoint = "{folder}"\nconfidence_threshold = 0.3\n'
    file.write_text(text, encoding="utf-8")
    builder = PipelineBuilder.from_file(file, plugins=plugins()).own_width().model(model())
    with builder.build() as pipeline:
        assert "format dspark" in pipeline.describe()
        assert pipeline.generate((1, 2), max_tokens=6).stats.drafted


def test_unsupported_kinds_are_unsupported_models(tmp_path: Path) -> None:
    folder = write(tmp_path, "speculators", PLAIN)
    rewrite(folder, put("speculators_model_type", value="mtp"))
    with pytest.raises(UnsupportedModelError, match="dflash, dflash2, dspark are"):
        described(folder)
