"""Costs of cycles: measured by the engine itself, kept, and used by `adaptive`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import draftloom
from draftloom import ComponentInfo, Width
from draftloom.calibration import CycleTimer, calibrate, costs_folder
from draftloom.costs import CycleCosts
from draftloom.verifiers.width.adaptive import AdaptiveWidth

from .fakes import PROMPT, Offer, Scripted, model, pipeline_of, plain
from .test_width import Machine

COSTS = CycleCosts(0.02, ((1, 0.022), (4, 0.025), (15, 0.047)), 0.0, "then")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "draftloom" / "costs"


def repeats(limit: int | None = 15) -> Scripted:
    """A drafter that always has a proposal."""
    return Scripted(lambda known, width: [3] * width, max_width=limit)


# --- the numbers -----------------------------------------------------------------------------


def test_between_points_and_past_them_costs_lie_on_lines() -> None:
    assert COSTS.at(1) == 0.022
    assert COSTS.at(4) == 0.025
    assert COSTS.at(2) == pytest.approx(0.023)
    assert COSTS.at(15) == pytest.approx(0.047)
    assert COSTS.at(26) == pytest.approx(0.069)
    one = CycleCosts(0.02, ((4, 0.028),))
    assert one.at(2) == pytest.approx(0.024)
    assert one.at(8) == pytest.approx(0.036)


def test_falling_points_do_not_reach_zero() -> None:
    odd = CycleCosts(0.02, ((1, 0.08), (2, 0.04)))
    assert odd.at(15) == pytest.approx(0.02)


def test_they_are_read_as_they_were_written() -> None:
    assert CycleCosts.of(json.loads(json.dumps(COSTS.as_data()))) == COSTS


def test_where_passes_are_traced_only_what_was_measured_is_chosen() -> None:
    traced = CycleCosts(0.02, ((4, 0.025), (15, 0.027)), alone=True)
    assert CycleCosts.of(traced.as_data()) == traced
    assert COSTS.choices(3) == [1, 2, 3]
    assert traced.choices(15) == [4, 15]
    assert traced.choices(8) == [4]
    assert traced.choices(3) == [3], "the end of a text: better than nothing"


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        {**COSTS.as_data(), "plain": 0},
        {**COSTS.as_data(), "plain": "soon"},
        {**COSTS.as_data(), "widths": []},
        {**COSTS.as_data(), "widths": [[0, 1.0]]},
        {**COSTS.as_data(), "widths": [[2, 1.0], [1, 1.0]]},
        {**COSTS.as_data(), "widths": [[1, -1.0]]},
    ],
)
def test_what_is_no_costs_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 any of several texts
        CycleCosts.of(wrong)


# --- measuring -------------------------------------------------------------------------------


def test_every_width_that_the_drafter_knows_is_measured() -> None:
    with pipeline_of(repeats(6)) as pipeline:
        costs = CycleTimer(pipeline._parts).measure(seconds=60)
    assert costs is not None
    assert [width for width, _ in costs.widths] == [1, 2, 4, 6]
    assert costs.plain > 0
    assert costs.slots is not None


def test_short_of_time_one_width_is_measured_all_the_same() -> None:
    with pipeline_of(repeats()) as pipeline:
        costs = CycleTimer(pipeline._parts).measure(seconds=0)
    assert costs is not None
    assert [width for width, _ in costs.widths] == [1]


@pytest.mark.parametrize(
    "drafter", ["none", Scripted(lambda known, width: [])], ids=["none", "no proposals"]
)
def test_without_proposals_there_is_nothing_to_measure(drafter: Any) -> None:
    with pipeline_of(drafter) as pipeline:
        assert CycleTimer(pipeline._parts).measure() is None


def test_prompt_lookup_finds_something_in_the_made_up_text() -> None:
    with pipeline_of("prompt-lookup") as pipeline:
        assert CycleTimer(pipeline._parts).cycle_seconds(2, 1) is not None


def test_a_context_too_short_is_no_error() -> None:
    target = model()
    before = target.args.max_position_embeddings
    with pipeline_of(repeats()) as pipeline:
        info = pipeline._parts.target.info
        pipeline._parts.target.info = draftloom.TargetInfo(  # as a config with 16 positions
            **{**{f: getattr(info, f) for f in info.__slots__ if f[0] != "_"}, "context_limit": 16}
        )
        assert calibrate(pipeline._parts, pipeline.spec) is None
    assert target.args.max_position_embeddings == before


def test_observers_and_the_text_feel_nothing_of_it() -> None:
    heard: list[Any] = []

    class Listener:
        @draftloom.hookimpl
        def cycle_finished(self, event: Any) -> None:
            heard.append(event)

        @draftloom.hookimpl
        def generation_finished(self, event: Any) -> None:
            heard.append(event)

    text = plain(model(), PROMPT, 12)
    with pipeline_of(repeats(), Listener(), configure=lambda b: b.width("adaptive")) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=12)
    assert result.token_ids == text
    assert len(heard) == result.stats.cycles + 1
    assert "measured" in result.stats.width


# --- keeping ---------------------------------------------------------------------------------


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


def test_costs_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipeline_of(repeats()) as pipeline:
        first = calibrate(pipeline._parts, pipeline.spec)
        assert len(kept(folder)) == 1
        assert costs_folder() == folder
        monkeypatch.setattr(CycleTimer, "measure", lambda self: pytest.fail("measured again"))
        assert calibrate(pipeline._parts, pipeline.spec) == first
        monkeypatch.setattr(CycleTimer, "measure", lambda self: COSTS)
        assert calibrate(pipeline._parts, pipeline.spec, fresh=True) == COSTS
        assert calibrate(pipeline._parts, pipeline.spec) == COSTS


@pytest.mark.parametrize("text", ["", "{", "[]", '{"costs": {"plain": -1}}', "\x00"])
def test_a_spoilt_file_is_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(CycleTimer, "measure", lambda self: COSTS)
    with pipeline_of(repeats()) as pipeline:
        calibrate(pipeline._parts, pipeline.spec)
        (path,) = kept(folder)
        path.write_text(text)
        assert calibrate(pipeline._parts, pipeline.spec) == COSTS
        assert json.loads(path.read_text())["costs"]["plain"] == COSTS.plain


def test_a_folder_that_cannot_be_written_costs_no_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    monkeypatch.setattr(CycleTimer, "measure", lambda self: COSTS)
    with pipeline_of(repeats()) as pipeline:
        assert calibrate(pipeline._parts, pipeline.spec) == COSTS
    assert folder.read_text() == "a file in its place"


def test_another_target_drafter_or_kernel_has_costs_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CycleTimer, "measure", lambda self: COSTS)
    variants: list[dict[str, Any]] = [
        {"drafter": repeats()},
        {"drafter": repeats(), "target": model("hybrid")},
        {"drafter": "prompt-lookup"},
        {"drafter": repeats(), "configure": lambda b: b.rollback("snapshot")},
        {"drafter": repeats(), "configure": lambda b: b.kernels({"gated-delta": "array"})},
        # The same target with other values, another width and temperature: the same costs.
        {"drafter": repeats(), "target": model("attention", 1)},
        {"drafter": repeats(), "configure": lambda b: b.width(3).sampling(temperature=0.5)},
    ]
    for variant in variants:
        with pipeline_of(**variant) as pipeline:
            calibrate(pipeline._parts, pipeline.spec)
    assert len(kept(folder)) == 5


@pytest.mark.parametrize(("how", "files"), [("cached", 1), ("fresh", 1), ("off", 0)])
def test_the_policy_says_whether(folder: Path, how: str, files: int) -> None:
    with pipeline_of(repeats(), configure=lambda b: b.width("adaptive", calibrate=how)) as pipeline:
        for _ in range(2):
            pipeline.generate(PROMPT, max_tokens=4)
    assert len(kept(folder)) == files


def test_an_unknown_way_is_a_problem_of_the_pipeline() -> None:
    builder = draftloom.PipelineBuilder().drafter("prompt-lookup")
    with pytest.raises(draftloom.GraphError, match="calibrate must be one of cached, fresh, off"):
        builder.width("adaptive", calibrate="often").check()


# --- using -----------------------------------------------------------------------------------


def test_with_costs_nothing_is_tried_that_cannot_pay() -> None:
    policy = AdaptiveWidth()
    policy.take_costs(CycleCosts(0.020, ((1, 0.050), (4, 0.125))))
    run = Machine(0.020, 0.025, 0.025, 0.6)
    run.run(policy, 30)
    assert run.widths == [0] * 30
    assert policy.report().startswith("no draft tokens (measured: a plain cycle takes 20.0 ms")


def test_with_costs_the_first_cycle_drafts_already() -> None:
    policy = AdaptiveWidth()
    policy.take_costs(CycleCosts(0.016, ((1, 0.0202), (15, 0.023))))
    run = Machine(0.016, 0.020, 0.0002, 0.85)
    run.run(policy, 300)
    assert run.widths[0] >= 4
    assert 0 not in run.widths[:50]
    assert run.tokens / run.seconds > 0.95 * run.best_rate()
    assert "accepted by position 8" in policy.report()


def test_costs_that_have_changed_are_followed() -> None:
    """Measured when the machine was idle; now a wide cycle takes five times as long."""
    policy = AdaptiveWidth()
    policy.take_costs(CycleCosts(0.016, ((1, 0.0202), (15, 0.023))))
    run = Machine(0.016, 0.100, 0.001, 0.5)
    run.run(policy, 400)
    assert run.widths[-50:].count(0) >= 45


def test_a_traced_width_is_not_given_up_for_the_cycles_that_trace_it() -> None:
    """Its first two cycles take 40 ms each; then it pays. Between measured widths nothing is
    chosen, whatever a line says of them."""
    policy = AdaptiveWidth()
    policy.take_costs(CycleCosts(0.0018, ((15, 0.0051),), alone=True))
    chosen = []
    for cycle in range(60):
        chosen.append(policy.choose(15).verify)
        policy.observe(chosen[-1], chosen[-1], 5, 0.04 if cycle < 2 else 0.0051)
    assert chosen == [15] * 60


def test_a_width_that_takes_far_longer_for_good_is_given_up() -> None:
    policy = AdaptiveWidth()
    policy.take_costs(CycleCosts(0.0018, ((15, 0.0051),), alone=True))
    chosen = []
    for _ in range(60):
        chosen.append(policy.choose(15).verify)
        policy.observe(chosen[-1], chosen[-1], 5, 0.04 if chosen[-1] else 0.0018)
    assert chosen[0] == 15
    assert chosen.count(15) < 12


def test_all_slots_are_filled_where_they_cost_nothing() -> None:
    free, dear = AdaptiveWidth(), AdaptiveWidth()
    free.take_costs(CycleCosts(0.016, ((1, 0.018), (4, 0.024), (15, 0.046)), slots=0.0002))
    dear.take_costs(CycleCosts(0.016, ((1, 0.018), (4, 0.024), (15, 0.046)), slots=0.0040))
    for policy, all_slots in ((free, True), (dear, False)):
        width = policy.choose(15)
        assert 1 <= width.verify < 15
        assert width == Width(15 if all_slots else width.verify, width.verify)


def test_a_policy_that_reports_nothing_leaves_the_field_empty() -> None:
    class Silent:
        info = ComponentInfo("silent")

        def choose(self, limit: int) -> Width:
            return Width(0, 0)

        def observe(self, *args: Any) -> None:
            """Nothing."""

    extra = Offer("silent", width={"silent": Silent()})
    with pipeline_of("none", extra, configure=lambda b: b.width("silent")) as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=2).stats.width == ""


def test_a_drafter_with_a_model_that_is_loaded_already(folder: Path) -> None:
    small = pipeline_of(target=model("attention", 2))
    with (
        small,
        pipeline_of(
            "none", configure=lambda b: b.drafter("autoregressive", model=small._parts.target)
        ) as pipeline,
    ):
        assert calibrate(pipeline._parts, pipeline.spec) is not None
    assert len(kept(folder)) == 1


def test_it_can_be_done_before_the_first_text(folder: Path) -> None:
    with pipeline_of(repeats(), configure=lambda b: b.width("adaptive")) as pipeline:
        pipeline.calibrate()
        before = kept(folder)
        pipeline.generate(PROMPT, max_tokens=2)
    assert len(before) == 1
    assert kept(folder) == before


def test_a_text_at_a_fixed_width_waits_for_no_measurement(folder: Path) -> None:
    with pipeline_of(repeats(), configure=lambda b: b.width("auto")) as pipeline:
        pipeline.generate(PROMPT, max_tokens=2, temperature=0.5, seed=1)
        assert not kept(folder)
        pipeline.generate(PROMPT, max_tokens=2)
    assert len(kept(folder)) == 1
