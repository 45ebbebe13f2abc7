"""The mismatch alarm: it rings for drafters that do not belong to the target, and for no other."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import draftloom
from draftloom import ComponentInfo, DrafterMismatchWarning, MismatchEvent, ModelError
from draftloom.events import CycleEvent
from draftloom.mismatch import CONTEXT, ERROR, MOST, MismatchMonitor
from draftloom.verifiers.width.adaptive import AdaptiveWidth
from draftloom.verifiers.width.fixed import FixedWidth
from tests.support import models, pipelines
from tests.support.oracle import greedy
from tests.support.reader import FeatureReader, Library, make_library

PAIRED = ComponentInfo("dflash", paired=("dflash",))


def cycle(accepted: int, verified: int = 3, source: str = "dflash") -> CycleEvent:
    return CycleEvent(1, (1,) * (accepted + 1), verified, verified, accepted, source, 0.1)


def hear(monitor: MismatchMonitor, accepted: Any, source: str = "dflash") -> MismatchEvent | None:
    """Cycles in contexts that are all new; the alarm, if it rings."""
    for i, count in enumerate(accepted):
        event = monitor.hear(cycle(int(count), source=source), (i // 97, i % 97, 0, 0))
        if event is not None:
            return event
    return None


# --- the rule ---------------------------------------------------------------------------------


def chances(monitor: MismatchMonitor, rate: float) -> tuple[float, float, float]:
    """Exactly, for independent cycles: chance of the alarm, of the all-clear, mean contexts."""
    hit = math.log(monitor.bad / monitor.good)
    miss = math.log((1 - monitor.bad) / (1 - monitor.good))
    edge = -math.log(ERROR)
    alive, alarm, clear, contexts = np.array([1.0]), 0.0, 0.0, 0.0
    for n in range(1, MOST):
        contexts += alive.sum()
        grown = np.zeros(n + 1)
        grown[:n] += alive * (1 - rate)
        grown[1:] += alive * rate
        hits = np.arange(n + 1)
        evidence = hits * hit + (n - hits) * miss
        alarm += grown[evidence >= edge].sum()
        clear += grown[evidence <= -edge].sum()
        grown[np.abs(evidence) >= edge] = 0
        alive = grown
    return alarm, clear, contexts


@pytest.mark.parametrize("stated", [None, 1.73, 3.3, 6.5])
def test_error_rates_are_what_is_promised(stated: float | None) -> None:
    monitor = MismatchMonitor(ComponentInfo("x", paired=("x",), stated_length=stated))
    at_good, at_bad = chances(monitor, monitor.good), chances(monitor, monitor.bad)
    assert at_good[0] <= ERROR
    assert at_good[1] > 0.99
    assert at_bad[0] >= 1 - ERROR
    nothing = chances(monitor, 0.0)
    assert nothing[0] == pytest.approx(1.0)
    assert nothing[2] <= 60, "contexts until a drafter that never hits is found out"
    assert monitor.bad == pytest.approx(monitor.good / 5)


def test_what_a_checkpoint_states_raises_the_bar() -> None:
    def good(stated: float | None) -> float:
        return MismatchMonitor(ComponentInfo("x", paired=("x",), stated_length=stated)).good

    assert good(None) == good(1.0) == good(1.2) == 0.15
    assert good(6.5) == pytest.approx(0.4 * (1 - 1 / 6.5))


def test_it_rings_once_with_the_numbers() -> None:
    monitor = MismatchMonitor(ComponentInfo("dflash", paired=("dflash",), stated_length=3.3))
    event = hear(monitor, [0] * 200)
    assert event is not None
    assert (event.drafter, event.first_accepted, event.acceptance_length) == ("dflash", 0, 1.0)
    assert 20 < event.cycles == event.contexts < 60
    assert (event.stated_length, event.unrelated_rate) == (3.3, monitor.bad)
    assert monitor.verdict is False
    assert monitor.message == event.message
    assert hear(monitor, [0] * 500) is None
    for part in (
        "'dflash'", "acceptance length 1.00 over", "about 1.0; the checkpoint states 3.30",
        "0 of", "tap layers", "fine-tune", "tokenizer", "text is the target's",
    ):  # fmt: skip
        assert part in event.message
    assert "\n" not in event.said


def test_after_the_all_clear_nothing_makes_it_ring() -> None:
    monitor = MismatchMonitor(PAIRED)
    assert hear(monitor, [1] * 10) is None
    assert monitor.verdict is True
    assert hear(monitor, [0] * 1000) is None


def test_what_is_never_decided_ends_in_silence() -> None:
    monitor = MismatchMonitor(PAIRED)
    # Just where neither hypothesis gains: one in thirteen.
    assert hear(monitor, [i % 13 == 0 for i in range(MOST + 10)]) is None
    assert monitor.verdict is True


def test_a_text_that_goes_round_in_circles_counts_once() -> None:
    monitor = MismatchMonitor(PAIRED)
    for i in range(5000):
        assert monitor.hear(cycle(0), (i % 40, 1, 2, 3)) is None
    assert monitor.verdict is None


@pytest.mark.parametrize("source", ["prompt-lookup", ""])
def test_drafts_that_were_made_for_no_target_are_not_judged(source: str) -> None:
    monitor = MismatchMonitor(PAIRED)
    assert hear(monitor, [0] * 500, source) is None
    assert monitor.verdict is None


def test_plain_cycles_are_not_judged() -> None:
    monitor = MismatchMonitor(PAIRED)
    for i in range(500):
        assert monitor.hear(cycle(0, verified=0), (i, 0, 0, 0)) is None
    assert monitor.verdict is None


# --- what a pipeline does ---------------------------------------------------------------------

WIDTH, LAYER = 3, 1


@lru_cache(maxsize=4)
def target(seed: int) -> Any:
    """Of 200 words, so that chance hits are rare and texts vary. Every layer turns the hidden
    states over: in most models neighbouring layers give nearly the same, and taking one for the
    other costs little."""
    model = models.new(models.FAMILIES["qwen3"], seed, vocab_size=200)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 8
        layer.mlp.down_proj.weight *= 64
    return model


@lru_cache(maxsize=4)
def prompts() -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(5)
    return tuple(tuple(int(t) for t in rng.integers(200, size=6)) for _ in range(8))


@lru_cache(maxsize=4)
def library(seed: int) -> Library:
    """What the drafter of a target knows."""
    texts = [[*p, *greedy(target(seed), p, 40)] for p in prompts()]
    with pipelines.adapter(target(seed)) as adapted:
        return make_library(adapted, texts, LAYER, WIDTH)


class Noise(FeatureReader):
    """Drafts at random."""

    def propose(self, anchor: mx.array, width: int, sampling: Any) -> draftloom.Draft:
        return draftloom.Draft.deterministic(mx.random.randint(0, 200, (1, width)))


STATED = 3.9
"""What the right pair gets here: half of it would be hard text, a third of it is another matter."""
DRAFTERS = {
    "right": lambda: FeatureReader(library(0), LAYER, STATED),
    "taps one up": lambda: FeatureReader(library(0), LAYER + 1, STATED),
    "taps one down": lambda: FeatureReader(library(0), LAYER - 1, STATED),
    "another target's": lambda: FeatureReader(library(1), LAYER),
    "random": lambda: Noise(library(0), LAYER),
}


class Heard:
    """A plugin that registers a drafter and keeps what observers are told."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.events = drafter, list[MismatchEvent]()

    @draftloom.hookimpl
    def register_drafters(self, register: Any) -> None:
        register("test.reader", lambda: self.drafter, self.drafter.info)

    @draftloom.hookimpl
    def drafter_mismatched(self, event: MismatchEvent) -> None:
        self.events.append(event)


def run(name: str, width: Any = None, **options: Any) -> tuple[list[Any], list[MismatchEvent]]:
    """Generate from each prompt in one pipeline: the results, and the alarms."""
    heard = Heard(DRAFTERS[name]())
    plugins = draftloom.PluginManager(entry_points=False, extra=[heard])
    builder = draftloom.PipelineBuilder(plugins=plugins).model(target(0)).drafter("test.reader")
    builder = builder.width("fixed" if width is None else width, **options)
    with builder.build() as pipeline:
        results = [pipeline.generate(prompt, max_tokens=40) for prompt in prompts()]
    return results, heard.events


def test_the_right_pair_never_makes_it_ring() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DrafterMismatchWarning)
        results, alarms = run("right")
    assert alarms == []
    assert all(r.stats.mismatch == "" for r in results)
    assert min(r.stats.acceptance_length for r in results) > 2


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "right"])
def test_it_rings_and_a_width_of_no_number_is_parked(name: str) -> None:
    with pytest.warns(DrafterMismatchWarning) as told:
        results, alarms = run(name)
    for prompt, result in zip(prompts(), results, strict=True):
        assert list(result.token_ids) == greedy(target(0), prompt, 40)
    assert len(told) == len(alarms) == 1
    event = alarms[0]
    assert event.parked
    assert event.first_accepted / event.contexts < event.expected_rate
    assert "the target goes on alone" in str(told[0].message)
    drafted = [r.stats.drafted for r in results]
    rang = next(i for i, r in enumerate(results) if r.stats.mismatch)
    assert results[rang].stats.mismatch == event.message
    assert results[-1].stats.mismatch == event.message, "later texts of the pipeline say so too"
    assert all(drafted[: rang + 1])
    assert not any(drafted[rang + 1 :])
    assert results[-1].as_dict()["mismatch"] == event.message


@pytest.mark.parametrize(
    ("width", "options", "parked"),
    [
        (3, {}, False),
        (3, {"park": True}, True),
        (None, {"park": False}, False),
    ],
)
def test_who_chooses_a_width_chooses_what_the_alarm_does(
    width: Any, options: dict[str, Any], parked: bool
) -> None:
    with pytest.warns(DrafterMismatchWarning):
        results, alarms = run("random", width, **options)
    assert [event.parked for event in alarms] == [parked]
    assert bool(results[-1].stats.drafted) is not parked


def test_hot_sampling_is_not_judged() -> None:
    """Above temperature 1 nobody agrees with the target, not even its own drafter."""
    builder = pipelines.builder(target(0)).sampling(temperature=1.5, seed=1)
    drafter = "autoregressive"
    with builder.drafter(drafter, model=pipelines.adapt(target(1))).width(3).build() as pipeline:
        result = pipeline.generate(prompts()[0], max_tokens=80)
        assert pipeline._parts.monitor.verdict is None
    assert result.stats.mismatch == ""


def test_a_policy_that_cannot_park_is_left_alone() -> None:
    assert FixedWidth(3).park() is False
    assert FixedWidth(3).choose(9) == (3, 3)
    fixed, adaptive = FixedWidth(3, park=True), AdaptiveWidth()
    assert fixed.park()
    assert adaptive.park()
    for policy in (fixed, adaptive):
        policy.observe(0, 0, 0, 0.01)
        assert policy.choose(9) == (0, 0)
    stubborn = AdaptiveWidth(park=False)
    assert not stubborn.park()
    stubborn.observe(0, 0, 0, 0.01)
    assert stubborn.choose(9) == (2, 2)


def test_a_cascade_is_judged_by_its_paired_stages_only() -> None:
    from draftloom.drafters.cascade import CascadeDrafter

    stages = [SimpleNamespace(info=ComponentInfo("prompt-lookup")), FeatureReader(None, 1)]
    assert CascadeDrafter(stages).info.paired == ("test.reader",)  # type: ignore[arg-type]


def test_the_context_ends_at_the_anchor() -> None:
    """What counts as one question is the text before the draft."""
    seen: list[tuple[int, ...]] = []
    heard = Heard(DRAFTERS["right"]())
    plugins = draftloom.PluginManager(entry_points=False, extra=[heard])
    builder = draftloom.PipelineBuilder(plugins=plugins).model(target(0)).drafter("test.reader")
    prompt = prompts()[0]
    with builder.build() as pipeline:
        monitor = pipeline._parts.monitor
        monitor.hear = lambda event, context: seen.append(context)  # type: ignore
        cycles: list[CycleEvent] = []
        result = pipeline.generate(prompt, max_tokens=12, on_cycle=cycles.append)
    text, end = [*prompt, *result.token_ids], len(prompt)
    for event, context in zip(cycles, seen, strict=True):
        assert context == tuple(text[max(0, end - CONTEXT) : end])
        end += len(event.token_ids)


# --- what a checkpoint states -----------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, "3", True, float("nan")])
def test_a_stated_length_that_is_none(value: Any) -> None:
    info = draftloom.ModelInfo("some/drafter", Path(), {"draftloom": {"acceptance_length": value}})
    with pytest.raises(ModelError, match=r"some/drafter: draftloom\.acceptance_length"):
        _ = info.stated_length


def test_the_bundled_drafter_states_its_length() -> None:
    plan = draftloom.PipelineBuilder().check()
    assert plan.drafter.info.stated_length == 4.5
    assert plan.spec.width.use == "auto"
    assert dict(plan.spec.width.options) == {"default": 15}
    measured = draftloom.PipelineBuilder().own_width().check()
    assert dict(measured.spec.width.options) == {"tokens": 15, "park": True}
