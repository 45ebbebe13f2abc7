"""A pipeline as TOML: reading and writing are inverse; every mistake is listed."""

import math
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from draftloom import (
    ComponentSpec,
    GraphError,
    InsertSpec,
    KVQuantization,
    PipelineBuilder,
    PipelineSpec,
    SamplingParams,
    UsageError,
)
from draftloom.spec import SAMPLING_KEYS

from .fakes import plugins, quick

EXAMPLE = """
target = "Qwen/Qwen3.5-9B"
drafter = { use = "dflash", checkpoint = "z-lab/Qwen3.5-9B-DFlash", width = 15 }
acceptance = "greedy"
rollback = { gated-delta = "tape-replay", attention = "trim" }
[[insert]]
use = "my-lab.entropy-probe"
after = "verify"
"""

# --- round trip ------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=12)
keys = st.text(min_size=1, max_size=8).filter(lambda k: k not in ("use", "after", "before"))
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
scalars = st.booleans() | numbers | st.text(max_size=12)


def components(values: st.SearchStrategy[Any], names: st.SearchStrategy[str]) -> Any:
    """Components with options of the given values."""
    return st.builds(ComponentSpec.make, names, st.dictionaries(keys, values, max_size=3))


options = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | components(inner, names),
    max_leaves=6,
)
component_specs = components(options, names)
rollbacks = component_specs | st.dictionaries(keys, component_specs, min_size=1, max_size=3).map(
    lambda pairs: tuple(sorted(pairs.items(), key=lambda pair: pair[0]))
)
samplings = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("temperature", "top_p", "min_p"), st.floats(0, 1))
    | dict.fromkeys(("top_k", "seed", "presence_context_size"), st.integers(0, 2**32))
    | {
        "logit_bias": st.dictionaries(
            st.integers(0, 2**20), st.floats(-9, 9) | st.just(-math.inf), max_size=3
        ),
        "xtc_special_tokens": st.lists(st.integers(0, 2**20), max_size=3),
    },
).map(lambda given: PipelineBuilder(plugins=plugins()).sampling(**given).spec.sampling)
kv_caches = st.builds(
    KVQuantization,
    st.sampled_from((2, 3, 4, 5, 6, 8)),
    st.sampled_from((32, 64, 128)),
    st.integers(0, 2**20),
)
places = st.tuples(names, st.just("")) | st.tuples(st.just(""), names)
inserts = st.builds(lambda c, place: InsertSpec(c, *place), component_specs, places)
specs = st.builds(
    PipelineSpec,
    target=st.text(max_size=12),
    dtype=names,
    drafter=component_specs,
    verifier=component_specs,
    acceptance=component_specs,
    rollback=rollbacks,
    width=component_specs
    | st.integers(0, 64).map(lambda n: ComponentSpec.make("fixed", {"tokens": n})),
    sampling=samplings,
    kv_cache=st.none() | kv_caches,
    inserts=st.lists(inserts, max_size=3).map(tuple),
)


@quick
@given(specs)
@example(PipelineSpec())
@example(PipelineSpec(target="a\x7fb\\\"\t'\u2028"))
@example(PipelineSpec(drafter=ComponentSpec.make("cascade", {"stages": [{"use": "none"}]})))
def test_reading_undoes_writing(spec: PipelineSpec) -> None:
    assert PipelineSpec.from_toml(spec.to_toml()) == spec


def test_defaults_are_not_written() -> None:
    assert PipelineSpec().to_toml().strip() == ""
    assert PipelineSpec(dtype="float16").to_toml() == 'dtype = "float16"\n'


def test_every_sampling_parameter_but_processors_can_be_written() -> None:
    fields = {field.name for field in attrs.fields(SamplingParams)}
    assert set(SAMPLING_KEYS) == fields - {"logits_processors"}
    spec = PipelineBuilder(plugins=plugins()).sampling(logit_bias={7: -1.5, 30: 2}).spec
    assert spec.to_toml() == "sampling = { logit_bias = { 30 = 2, 7 = -1.5 } }\n"
    code = PipelineBuilder(plugins=plugins()).sampling(logits_processors=[print]).spec
    with pytest.raises(UsageError, match="logits_processors cannot be written to TOML"):
        code.to_toml()


def test_what_is_written_is_plain_toml() -> None:
    spec = PipelineSpec(
        drafter=ComponentSpec.make("cascade", {"stages": ["a", {"use": "b", "n": 2}]}),
        inserts=(InsertSpec(ComponentSpec("probe"), before="verify"),),
    )
    assert tomllib.loads(spec.to_toml()) == {
        "drafter": {"use": "cascade", "stages": ["a", {"use": "b", "n": 2}]},
        "insert": [{"use": "probe", "before": "verify"}],
    }


def test_option_that_toml_cannot_hold_is_refused() -> None:
    spec = PipelineSpec(drafter=ComponentSpec.make("autoregressive", {"model": object()}))
    with pytest.raises(UsageError, match="cannot be written to TOML"):
        spec.to_toml()


# --- reading ---------------------------------------------------------------------------------


def test_the_example_of_the_design() -> None:
    spec = PipelineSpec.from_toml(EXAMPLE)
    assert spec.target == "Qwen/Qwen3.5-9B"
    assert spec.drafter.use == "dflash"
    assert dict(spec.drafter.options) == {"checkpoint": "z-lab/Qwen3.5-9B-DFlash", "width": 15}
    assert spec.acceptance == ComponentSpec("greedy")
    assert spec.rollback == (
        ("attention", ComponentSpec("trim")),
        ("gated-delta", ComponentSpec("tape-replay")),
    )
    assert spec.inserts == (InsertSpec(ComponentSpec("my-lab.entropy-probe"), after="verify"),)
    assert PipelineSpec.from_toml(spec.to_toml()) == spec


def test_nested_stages_keep_their_options() -> None:
    spec = PipelineSpec.from_toml(
        'drafter = { use = "cascade", stages = '
        '["prompt-lookup", { use = "dflash", checkpoint = "x" }] }'
    )
    stages = dict(spec.drafter.options)["stages"]
    assert [ComponentSpec.of(stage) for stage in stages] == [
        ComponentSpec("prompt-lookup"),
        ComponentSpec.make("dflash", {"checkpoint": "x"}),
    ]


def test_an_integer_width_is_fixed() -> None:
    assert PipelineSpec.from_toml("width = 7").width == ComponentSpec.make("fixed", {"tokens": 7})


def test_order_of_options_does_not_matter() -> None:
    one = PipelineSpec.from_toml('drafter = { use = "x", a = 1, b = 2 }')
    assert one == PipelineSpec.from_toml('drafter = { b = 2, use = "x", a = 1 }')


def test_inserts_keep_their_order_and_options() -> None:
    spec = PipelineSpec.from_toml(
        '[[insert]]\nuse = "a"\nafter = "draft"\nlimit = 2\n[[insert]]\nuse = "b"\nbefore = "read"'
    )
    assert [i.component for i in spec.inserts] == [
        ComponentSpec.make("a", {"limit": 2}),
        ComponentSpec("b"),
    ]
    assert [(i.after, i.before) for i in spec.inserts] == [("draft", ""), ("", "read")]


# --- mistakes --------------------------------------------------------------------------------


def problems_of(text: str) -> list[str]:
    with pytest.raises(GraphError) as caught:
        PipelineSpec.from_toml(text, where="p.toml")
    assert "\n" not in str(caught.value)
    return [str(problem) for problem in caught.value.problems]


def test_all_mistakes_are_listed_at_once() -> None:
    found = problems_of('draftr = "x"\ntarget = 3\nverifier = [1]\nwidth = true\nzzzzz = 1\n')
    assert len(found) == 5
    text = "\n".join(found)
    for expected in (
        "unknown key 'draftr' (did you mean 'drafter'?",
        "p.toml: target: expected text, got 3",
        "p.toml: verifier: a component is a name or a table with 'use', got [1]",
        "p.toml: width: a component is a name or a table with 'use', got True",
        "unknown key 'zzzzz' (known: ",
    ):
        assert expected in text


def test_both_mistakes_in_one_table_are_listed() -> None:
    text = "\n".join(problems_of('sampling = { temprature = 1, top_p = "high" }'))
    assert "did you mean 'temperature'?" in text
    assert "top_p must be a number, got 'high'" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("target = ", "not valid TOML"),
        ("sampling = 3", "expected a table, got 3"),
        ("sampling = { seed = true }", "seed must be a number, got True"),
        ("drafter = { use = 5 }", "5"),
        ("rollback = { attention = 5 }", "got 5"),
        ('insert = "probe"', "[[insert]]"),
        ('[[insert]]\nuse = "a"', "one of 'after' and 'before'"),
        ('[[insert]]\nuse = "a"\nafter = "x"\nbefore = "y"', "one of 'after' and 'before'"),
        ('[[insert]]\nafter = "x"', "needs 'use'"),
        ('[[insert]]\nuse = "a"\nafter = 3', "expected text, got 3"),
    ],
)
def test_each_mistake_is_named(text: str, expected: str) -> None:
    (problem,) = problems_of(text)
    assert expected in problem


def test_a_file_is_named_in_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("tarjet = 'x'", encoding="utf-8")
    with pytest.raises(GraphError, match=r"mine\.toml.*did you mean 'target'"):
        PipelineSpec.from_file(path)


@pytest.mark.parametrize("content", [None, b"target = '\xff\xfe'"], ids=["missing", "not utf-8"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read"):
        PipelineSpec.from_file(path)
