"""The switches: what is refused before weights are loaded, and what reaches the components."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

import draftloom
from draftloom import GraphError, KernelSettings, PipelineSpec, Tunable, UsageError
from draftloom.adapters.gated_delta import RecordingMixer
from draftloom.apps.cli.options import PipelineFlags, parse_kernels
from draftloom.caches.fixed_length import FixedLengthEntry
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.caches.trim import TrimRollback
from draftloom.kernel_settings import operations
from draftloom.kernels.gated_delta import array, dispatch

from . import fakes


class Counting:
    """A third party's gated delta rule: the array path, which counts its calls."""

    name = "my-lab.counting"
    info = draftloom.ComponentInfo("gated-delta/my-lab.counting", "counts")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def supports(self, request: Any) -> str | None:
        return "it has none" if request.operation == "replay_verify" else None

    def verify(self, *block: Any, write_state: bool = True) -> Any:
        self.calls.append("verify")
        return array.verify(*block)

    def replay(self, *given: Any) -> mx.array:
        self.calls.append("replay")
        return array.replay(*given)

    def prefill(self, *block: Any) -> tuple[mx.array, mx.array]:
        self.calls.append("prefill")
        return array.prefill(*block)


class Plugin:
    """Registers a kernel object, and one that cannot run here."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    @draftloom.hookimpl
    def register_kernels(self, register: Any) -> None:
        register("gated-delta/my-lab.counting", self.kernel, Counting.info)


def builder(*extra: Any, config: str = "hybrid") -> draftloom.PipelineBuilder:
    made = draftloom.PipelineBuilder(plugins=fakes.plugins(*extra))
    return made.model(fakes.model(config)).drafter("prompt-lookup").width(3)


def text_of(made: draftloom.PipelineBuilder) -> tuple[int, ...]:
    with made.build() as pipeline:
        return pipeline.generate(fakes.PROMPT, max_tokens=24).token_ids


# --- as data ----------------------------------------------------------------------------------


def test_a_pipeline_file_has_them() -> None:
    text = 'kernels = { gated_delta = "Array", ssm = "auto", fixed-length-caches = "off" }\n'
    spec = PipelineSpec.from_toml(text)
    assert spec.kernels.as_data() == {"fixed-length-caches": "off", "gated-delta": "array"}
    assert PipelineSpec.from_toml(spec.to_toml()) == spec
    assert "kernels" not in PipelineSpec.from_toml('kernels = { ssm = "auto" }').to_toml()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kernels = 3", "expected a table"),
        ("kernels = { ssm = false }", "ssm must be a name, got False"),
        ('kernels = { ssm = " " }', "ssm must be a name"),
        ('kernel = { ssm = "off" }', "did you mean 'kernels'"),
    ],
)
def test_what_a_file_cannot_say(text: str, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        PipelineSpec.from_toml(text)


def test_use_and_choice() -> None:
    settings = KernelSettings.of({"gated-delta": "chunked", "ssm": "off"})
    assert settings.use("gated-delta") == settings.choice("gated-delta") == "chunked"
    assert settings.use("packed-projections") is None
    assert settings.use("ssm", off="block") == "block"
    assert settings.is_off("ssm")
    assert not settings.is_off("gated-delta")
    over = settings.on_top({"ssm": "auto", "gated_delta": "array"})
    assert over.as_data() == {"gated-delta": "array"}
    assert str(over) == "gated-delta array"


def test_a_builder_and_the_command_line_go_on_top(tmp_path: Any) -> None:
    made = builder().kernels({"ssm": "off"}).kernels({"gated-delta": "array"})
    assert made.spec.kernels.as_data() == {"gated-delta": "array", "ssm": "off"}
    assert made.kernels({"ssm": "auto"}).spec.kernels.as_data() == {"gated-delta": "array"}
    with pytest.raises(UsageError, match="expected a table"):
        made.kernels("off")  # type: ignore[arg-type]
    file = tmp_path / "p.toml"
    file.write_text('kernels = { gated-delta = "array", ssm = "off" }')
    flags = PipelineFlags(pipeline=file, kernel=["gated-delta=off"])
    found = flags.builder(fakes.plugins()).spec.kernels
    assert found.as_data() == {"gated-delta": "off", "ssm": "off"}
    for texts in (["ssm"], ["=off"], ["ssm=off", "ssm=block"]):
        with pytest.raises(UsageError, match="--kernel"):
            parse_kernels(texts)


# --- checked before weights are loaded --------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"gated-dela": "off"}, "no operation named 'gated-dela' .did you mean 'gated-delta'"),
        ({"gated-delta": "aray"}, "no implementation 'aray' .did you mean 'array'"),
        ({"gated-delta": "metal"}, "gated-delta/metal cannot run here: MLX was built without"),
        ({"gated-delta": "cuda"}, "gated-delta/cuda cannot run here: MLX was built without"),
    ],
)
def test_what_does_not_exist_or_run_here(choices: dict[str, str], words: str) -> None:
    with pytest.raises(GraphError, match=words):
        builder().kernels(choices).check()


def test_all_problems_at_once() -> None:
    with pytest.raises(GraphError) as found:
        builder().kernels({"a": "off", "ssm": "b"}).verifier("blok").check()
    assert len(found.value.problems) == 3


def test_every_operation_is_registered() -> None:
    found = operations(fakes.plugins())
    assert {"gated-delta", "ssm", "fixed-length-caches"} <= set(found)
    assert found["gated-delta"] == list(dict.fromkeys(found["gated-delta"]))
    plugins = fakes.plugins()
    for component in plugins.components("kernel"):
        assert component.load() is not None  # every name leads to something


# --- what reaches the components --------------------------------------------------------------


def test_describe_says_what_was_chosen() -> None:
    shown = builder().kernels({"gated-delta": "off"}).check().graph.describe()
    assert ["kernels", "gated-delta", "off"] in [line.split() for line in shown.splitlines()]
    assert "kernels" not in builder().check().graph.describe()


@pytest.mark.parametrize("choice", ["auto", "off", "array"])
def test_exact_choices_are_lossless_to_the_bit(choice: str) -> None:
    plain = fakes.plain(fakes.model("hybrid"), fakes.PROMPT, 24)
    assert text_of(builder().kernels({"gated-delta": choice})) == plain


def test_a_third_party_serves_prompt_verify_and_replay() -> None:
    kernel = Counting()
    made = builder(Plugin(kernel))
    plain = fakes.plain(fakes.model("hybrid"), fakes.PROMPT, 24)
    assert text_of(made) == plain
    assert kernel.calls == []
    assert text_of(made.kernels({"gated-delta": "my-lab.counting"})) == plain
    assert set(kernel.calls) == {"prefill", "verify", "replay"}


def test_a_mixer_is_tuned_once_and_put_back() -> None:
    model = fakes.model("hybrid")
    with builder().kernels({"gated-delta": "chunked"}).build():
        mixers = [la.linear_attn for la in model.layers if la.is_linear]
        assert all(isinstance(m, RecordingMixer) and m._prompt for m in mixers)
        assert {m._use.implementation for m in mixers} == {"chunked"}
    with builder().kernels({"gated-delta": "off"}).build():
        assert not any(la.linear_attn._prompt for la in model.layers if la.is_linear)
    assert not any(
        isinstance(la.linear_attn, RecordingMixer) for la in model.layers if la.is_linear
    )


def test_a_preference_falls_back_where_a_name_is_refused() -> None:
    request = dispatch.Request("replay", mx.float32, 1, 4, 2, 4, 8, 8, "cpu")
    with pytest.raises(ValueError, match="cannot serve replay"):
        dispatch.choose(request, "chunked")
    choice = dispatch.choose(request, dispatch.prefer("chunked"))
    assert choice.name == "array"
    assert choice.rejected[0][0] == "chunked"
    assert dispatch.prefer(None) is None


def test_fixed_length_caches() -> None:
    cache, block = KVCache(), mx.zeros((1, 3), dtype=mx.int32)
    for choice, fixed in {"auto": False, "off": False, "allocated": True}.items():
        rollback = TrimRollback()
        rollback.tune(KernelSettings.of({"fixed-length-caches": choice}))
        assert isinstance(rollback.begin(cache, block).entry, FixedLengthEntry) is fixed
    told = TrimRollback(fixed_length=False)
    told.tune(KernelSettings.of({"fixed-length-caches": "allocated"}))
    assert told.begin(cache, block).entry is cache
    plain = fakes.plain(fakes.model("attention"), fakes.PROMPT, 24)
    made = builder(config="attention").kernels({"fixed-length-caches": "allocated"})
    assert text_of(made) == plain


def test_a_stand_in_of_a_third_party() -> None:
    seen: list[Any] = []

    class Lab:
        """Registers a stand-in that notes the cache."""

        @draftloom.hookimpl
        def register_kernels(self, register: Any) -> None:
            def stand_in(cache: Any) -> FixedLengthEntry:
                seen.append(cache)
                return FixedLengthEntry(cache)

            full = "fixed-length-caches/my-lab.noting"
            register(full, stand_in, draftloom.ComponentInfo(full, "notes the cache"))

    made = builder(Lab(), config="attention").kernels({"fixed-length-caches": "my-lab.noting"})
    assert text_of(made) == fakes.plain(fakes.model("attention"), fakes.PROMPT, 24)
    assert seen


def test_who_can_be_tuned() -> None:
    assert isinstance(TrimRollback(), Tunable)
    assert isinstance(TapeReplayRollback(), Tunable)
    assert not isinstance(object(), Tunable)


class Asks:
    """A drafter that keeps the settings it was bound with."""

    info = draftloom.ComponentInfo("my-lab.asks", law=draftloom.DraftLaw.DETERMINISTIC)

    def __init__(self) -> None:
        self.kernels: KernelSettings | None = None

    def bind(self, context: draftloom.BindContext) -> None:
        self.kernels = context.kernels

    def open(self, request: Any) -> Any:
        raise AssertionError("not reached")


def test_a_drafter_finds_them_when_it_is_bound() -> None:
    asks = Asks()
    made = builder(fakes.Offer(drafter={"my-lab.asks": asks})).drafter("my-lab.asks")
    made.kernels({"ssm": "block"}).build().close()
    assert asks.kernels is not None
    assert asks.kernels.choice("ssm") == "block"
