"""Simulated acceptance, random weights of known shapes, and the pass that times the stages."""

import threading
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from draftloom import CycleEvent, Draft, ModelInfo, PipelineBuilder, SamplingParams, SamplingState
from draftloom.adapters.base import make_skeleton
from draftloom.apps.bench.measure import Settings, _windows, measure
from draftloom.apps.bench.prompts import EncodedPrompt
from draftloom.apps.bench.simulate import (
    SimulatedAcceptance,
    _shapes,
    drafter_config,
    random_prompts,
    shape_names,
    simulated_subject,
)
from draftloom.apps.bench.stages import (
    STAGES,
    StageTimes,
    _Clock,
    _instrumented,
    all_repeats,
    time_stages,
)
from draftloom.apps.bench.subjects import Simulation, Subject
from draftloom.drafters.dflash import DFlashModel
from draftloom.drafters.formats import describe_checkpoint
from draftloom.errors import UnknownNameError, UsageError
from draftloom.plugins import PluginManager
from draftloom.recording import Deferred
from tests.support.models import build


def logits(rows: int, vocab: int = 8) -> mx.array:
    """Row i has its largest entry at i."""
    return mx.eye(vocab)[None, :rows]


def accepted(rates: list[float], seed: int, cycles: int, width: int = 3) -> list[int]:
    policy = SimulatedAcceptance(rates, seed)
    draft = Draft.deterministic(mx.zeros((1, width), dtype=mx.int32))
    state = SamplingState(SamplingParams())
    counts = []
    for _ in range(cycles):
        count, following = policy.accept(draft, logits(width + 1), state)
        assert following.tolist() == count.tolist()  # the target's own token of that row
        counts.append(int(count.item()))
    return counts


def test_prefixes_follow_the_rates() -> None:
    counts = accepted([0.8, 0.5], seed=3, cycles=2000)
    reached = [sum(c >= i for c in counts) for i in range(4)]
    shares = [b / a for a, b in pairwise(reached)]
    assert shares == pytest.approx([0.8, 0.5, 0.5], abs=0.06)


def test_draws_are_seeded() -> None:
    assert accepted([0.5], 1, 40) == accepted([0.5], 1, 40)
    assert accepted([0.5], 1, 40) != accepted([0.5], 2, 40)


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (1.0, 3)])
def test_certain_rates(rate: float, count: int) -> None:
    assert set(accepted([rate], 0, 20)) == {count}


def test_without_a_draft_nothing_is_accepted() -> None:
    count, following = SimulatedAcceptance([1.0]).accept(
        Draft.empty(), logits(1), SamplingState(SamplingParams())
    )
    assert (count.tolist(), following.tolist()) == ([0], [0])


@pytest.mark.parametrize("name", shape_names())
def test_shapes_describe_a_target_and_a_drafter_that_fit(name: str) -> None:
    shape = _shapes()[name]
    plugins = PluginManager(entry_points=False)
    model = ModelInfo(name, None, shape["target"])
    target = plugins.adapter_for(model).load().describe(model)
    config = describe_checkpoint(
        ModelInfo(name, None, drafter_config(shape["target"], shape["drafter"]))
    )
    assert config is not None
    assert list(config.problems(target)) == []
    assert len(set(config.tap_layers)) == shape["drafter"]["taps"]
    assert max(config.tap_layers) < target.num_layers


PARAMETERS = {  # in 10^9, of target and drafter; see the sources in shapes.toml
    "qwen3-8b": (8.19, 1.05),
    "qwen3.5-4b": (4.21, 0.634425856),
    "qwen3.5-9b": (8.95, 1.292),
    "qwen3.5-27b": (26.9, 1.730),
    "qwen3.5-35b-a3b": (34.7, 0.474),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_as_many_parameters_as_the_public_models(name: str) -> None:
    shape = _shapes()[name]
    skeleton, _ = make_skeleton(ModelInfo(name, None, shape["target"]))
    config = describe_checkpoint(
        ModelInfo(name, None, drafter_config(shape["target"], shape["drafter"]))
    )
    assert config is not None
    found = [
        sum(value.size for _, value in tree_flatten(module.parameters())) / 10**9
        for module in (skeleton, DFlashModel(config))
    ]
    assert found == pytest.approx(list(PARAMETERS[name]), rel=0.003)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return simulated_subject(
        Simulation("tiny", (0.8, 0.5), prompt_tokens=6),
        "float32",
        [("dflash", None), ("width 2", 2), ("adaptive", "adaptive")],
    )


def test_simulated_names_say_so(subject: Subject) -> None:
    assert all("simulated" in variant.name for variant in subject.variants)
    assert "simulated" in subject.name


def test_width_0_asked_for_again_is_there_once() -> None:
    widths = [("width 0", 0), ("width 2", 2), ("width 0", 0)]
    found = simulated_subject(Simulation("tiny", (0.5,)), "float32", widths)
    assert [v.name.removesuffix(" (simulated)") for v in found.variants] == [
        "mlx-lm", "width 0", "width 2",
    ]  # fmt: skip
    plain = found.variants[1]
    assert plain.builder is not None
    assert plain.builder.spec.drafter.use == "none"


def test_random_weights_are_finite_and_seeded(subject: Subject) -> None:
    again = simulated_subject(Simulation("tiny", (0.5,)), "float32", [("a", None)])
    ours, theirs = (tree_flatten(s.model.parameters()) for s in (subject, again))
    assert all(bool(mx.isfinite(value).all()) for _, value in ours)
    assert all(bool((a == b).all()) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def test_every_variant_runs_in_turns_and_writes_the_whole_length(subject: Subject) -> None:
    prompts = random_prompts(Simulation("tiny", (0.5,), prompt_tokens=6), subject.vocab_size, 2)
    settings = Settings(lengths=(4, 7), repeats=2, warm_up=2)
    found = measure(subject, settings, prompts, stages=True)
    runs, texts = found.runs, found.texts
    names = [variant.name for variant in subject.variants]
    assert len(runs) == len(names) * 2 * 2 * 2
    assert [run.order for run in runs] == list(range(len(runs)))
    turns = list(dict.fromkeys((run.repeat, run.variant) for run in runs))
    assert [name for repeat, name in turns if repeat == 0] == names
    assert [name for repeat, name in turns if repeat == 1] == [*names[1:], names[0]]
    assert all(run.tokens == run.length for run in runs)
    assert all(run.fell_back == "" and run.peak_bytes > 0 for run in runs)
    assert all(run.same_tokens is None for run in runs)
    assert all(run.verified == sum(run.verified_by_position) for run in runs)
    assert any(run.accepted for run in runs)
    assert all(sum(c for c, _ in run.windows) == run.cycles for run in runs)
    assert all(sum(a for _, a in run.windows) == run.accepted for run in runs)
    assert [text.variant for text in texts] == names[1:]
    assert all(len(text.pieces) == 4 for text in texts)
    origins = {origin for text in texts for _, origin, _ in text.pieces}
    assert origins <= {"first", "plain", "drafted", "corrected", "bonus"}
    assert all(text.pieces[0][1] == "first" for text in texts)
    timed = [name for _, name in turns if name != names[0]]
    assert [(one.variant, one.length) for one in found.stages] == [(name, 4) for name in timed]
    assert measure(subject, settings, prompts[:1]).stages == []


def test_windows_follow_the_text() -> None:
    events = [
        CycleEvent(0, (1,), 0, 0, 0, "", 0.0),
        CycleEvent(1, (1,) * 511, 510, 510, 510, "x", 0.0),
        CycleEvent(2, (1,) * 2, 4, 4, 1, "x", 0.0),
        CycleEvent(3, (1,), 4, 4, 0, "x", 0.0),
    ]
    assert _windows(events) == ((1, 510), (2, 1))


def test_unknown_shape_type_and_rate() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'qwen3-8b'"):
        simulated_subject(Simulation("qwen3-8", (0.5,)), "auto", [("a", None)])
    with pytest.raises(UsageError, match="no type 'float8'"):
        simulated_subject(Simulation("tiny", (0.5,)), "float8", [("a", None)])
    with pytest.raises(UsageError, match="outside"):
        simulated_subject(Simulation("tiny", (1.5,)), "auto", [("a", None)])


def pipeline_over(name: str, verifier: str = "block") -> Any:
    builder = PipelineBuilder(plugins=PluginManager(entry_points=False)).model(build(name))
    return builder.drafter("prompt-lookup").verifier(verifier).width(3).build()


@pytest.mark.parametrize("verifier", ["block", "sequential"])
@pytest.mark.parametrize("name", ["qwen3_5", "llama"])
def test_timing_the_stages_changes_no_token(name: str, verifier: str) -> None:
    prompt = (1, 2, 3, 1, 2, 3, 1, 2)
    with pipeline_over(name, verifier) as pipeline:
        plain = pipeline.generate(prompt, max_tokens=24)
        clock = _Clock()
        timed = _instrumented(pipeline, clock).generate(prompt, max_tokens=24)
        again = pipeline.generate(prompt, max_tokens=24)
    assert plain.token_ids == timed.token_ids == again.token_ids
    assert plain.stats.accepted == timed.stats.accepted
    assert set(clock.seconds) == set(STAGES) - {"host"}
    assert all(seconds > 0 for seconds in clock.seconds.values())


def test_timing_the_stages_replays_no_more_states(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [0]
    result = Deferred.result

    def counted(self: Deferred) -> Any:
        looks[0] += 1
        return result(self)

    monkeypatch.setattr(Deferred, "result", counted)
    builder = PipelineBuilder(plugins=PluginManager(entry_points=False)).model(build("qwen3_5"))
    builder = builder.drafter("prompt-lookup").width(3).kernels({"replay-verify": "on"})
    found = []
    with builder.build() as pipeline:
        for one in (pipeline, _instrumented(pipeline, _Clock())):
            looks[0] = 0
            one.generate((1, 2, 3, 1, 2, 3, 1, 2), max_tokens=24)
            found.append(looks[0])
    assert found[0] == found[1]


def test_stage_times_cover_all_stages_and_cycles() -> None:
    prompts = [EncodedPrompt("s", (1, 2, 3, 1, 2)), EncodedPrompt("s", (4, 5, 4, 5))]
    with pipeline_over("qwen3_5") as pipeline:
        cycles = [pipeline.generate(p.ids, max_tokens=12).stats.cycles for p in prompts]
        times = time_stages("x", pipeline, prompts, 12)
    assert times.cycles == sum(cycles)
    assert tuple(times.seconds) == STAGES
    assert times.seconds["verify"] > 0
    forward = times.seconds["draft"] + times.seconds["verify"]
    assert times.limits == ((times.cycles + times.accepted) / forward,)


def test_a_pass_over_texts_one_by_one_is_a_pass_over_all() -> None:
    one = StageTimes("a", 8, 5, 3, dict.fromkeys(STAGES, 0.5), (8.0,))
    two = StageTimes("a", 8, 1, 1, {**dict.fromkeys(STAGES, 0.5), "verify": 2.5}, (2 / 3,))
    both = StageTimes.one_pass([one, two])
    assert (both.cycles, both.accepted, both.limits) == (6, 4, (10 / 4.0,))
    assert both.seconds == {**dict.fromkeys(STAGES, 1.0), "verify": 3.0}
    nothing = StageTimes("a", 8, 0, 0, dict.fromkeys(STAGES, 0.0), ())
    assert StageTimes.one_pass([nothing]).limits == (0.0,)


def test_the_width_policy_learns_nothing_from_cycles_that_wait() -> None:
    builder = PipelineBuilder(plugins=PluginManager(entry_points=False)).model(build("qwen3_5"))
    builder = builder.drafter("prompt-lookup").width("adaptive", calibrate="off")
    prompts = [EncodedPrompt("s", (1, 2, 3, 1, 2))]
    with builder.build() as pipeline:
        pipeline.generate(prompts[0].ids, max_tokens=12)
        before = repr(vars(pipeline._parts.width))
        time_stages("x", pipeline, prompts, 12)
        assert repr(vars(pipeline._parts.width)) == before
        pipeline.generate(prompts[0].ids, max_tokens=12)
        assert repr(vars(pipeline._parts.width)) != before


def test_a_width_policy_that_cannot_be_copied_is_said() -> None:
    builder = PipelineBuilder(plugins=PluginManager(entry_points=False)).model(build("qwen3_5"))
    with builder.drafter("prompt-lookup").width("adaptive", calibrate="off").build() as pipeline:
        pipeline._parts.width.lock = threading.Lock()
        with pytest.raises(UsageError, match=r"adaptive.*cannot be copied.*--no-stages"):
            time_stages("x", pipeline, [EncodedPrompt("s", (1, 2, 3, 1, 2))], 4)


def test_stage_times_of_all_repeats_are_sums_by_variant() -> None:
    def one(variant: str, cycles: int, seconds: float) -> StageTimes:
        return StageTimes(variant, 8, cycles, 1, dict.fromkeys(STAGES, seconds), (seconds,))

    first, second = all_repeats([one("a", 2, 0.25), one("b", 7, 4.0), one("a", 3, 0.5)])
    assert first == StageTimes("a", 8, 5, 2, dict.fromkeys(STAGES, 0.75), (0.25, 0.5))
    assert second == one("b", 7, 4.0)
