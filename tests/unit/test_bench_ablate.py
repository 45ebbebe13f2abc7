"""What each kernel is worth: which switches are tried, and what the runs say of them."""

from __future__ import annotations

from typing import Any

import pytest

import draftloom
from draftloom import UsageError
from draftloom.apps.bench.ablate import AGAIN, AS_IT_IS, Ablation, Switch, add_worth, plan_ablation
from draftloom.apps.bench.html import render_html
from draftloom.apps.bench.report import summarize
from draftloom.apps.bench.table import worth_tables

from . import fakes
from .test_bench_report import marks, plots, report, run


class Fast:
    """An operation that `auto` runs here."""

    def by_default(self) -> bool:
        return True


class Lab:
    """A third party's plugin with it."""

    @draftloom.hookimpl
    def register_kernels(self, register: Any) -> None:
        info = draftloom.ComponentInfo("my-lab.op/fast", "fast")
        register("my-lab.op/fast", Fast(), info)


def planned(config: str = "hybrid", **kernels: str) -> Ablation:
    made = draftloom.PipelineBuilder(plugins=fakes.plugins(Lab())).model(fakes.model(config))
    choices = {name.replace("_", "-"): choice for name, choice in kernels.items()}
    return plan_ablation([("p", made.drafter("none").kernels(choices))])


# --- which switches ---------------------------------------------------------------------------


def test_each_switch_goes_the_other_way() -> None:
    ablation = planned()
    switches = {switch.name: switch for switch in ablation.switches}
    assert switches["my-lab.op=off"].removes
    assert not switches["gated-delta=chunked"].removes
    assert "gated-delta=off" not in switches  # it is what runs on the CPU
    assert "gated-delta=array" not in switches
    assert not switches["fixed-length-caches=allocated"].removes
    names = [name for name, _ in ablation.builders]
    assert names == [AS_IT_IS, AGAIN, *switches]
    specs = {name: builder.spec.kernels.as_data() for name, builder in ablation.builders}
    assert specs[AS_IT_IS] == specs[AGAIN] == {}
    assert specs["my-lab.op=off"] == {"my-lab.op": "off"}


def test_what_a_pipeline_has_on_is_taken_away() -> None:
    found = planned(gated_delta="chunked", fixed_length_caches="off")
    switches = {switch.name: switch.removes for switch in found.switches}
    assert switches["gated-delta=off"] is True
    assert switches["fixed-length-caches=allocated"] is False
    specs = {name: builder.spec.kernels.as_data() for name, builder in found.builders}
    assert specs["gated-delta=off"] == {"gated-delta": "off", "fixed-length-caches": "off"}


def test_what_cannot_be_measured_says_why() -> None:
    left_out = dict(planned().left_out)
    assert left_out["gated-delta/metal"].startswith("MLX was built without Metal")
    assert left_out["ssm"] == "qwen3_5 has no Mamba-2 layers"
    assert dict(planned("attention").left_out)["gated-delta"] == "qwen3 has no gated-delta layers"


def test_some_operations_only() -> None:
    made = draftloom.PipelineBuilder(plugins=fakes.plugins(Lab())).model(fakes.model("hybrid"))
    named = [("p", made.drafter("none"))]
    found = plan_ablation(named, ["my_lab.op", "gated-delta"])
    assert {switch.operation for switch in found.switches} == {"my-lab.op", "gated-delta"}
    assert {name.partition("/")[0] for name, _ in found.left_out} <= {"gated-delta"}
    with pytest.raises(draftloom.UnknownNameError, match="did you mean 'gated-delta'"):
        plan_ablation(named, ["gated-dela"])


def test_a_width_that_nobody_chose_is_the_drafters_own() -> None:
    made = draftloom.PipelineBuilder(plugins=fakes.plugins()).model(fakes.model("hybrid"))
    made = made.drafter("prompt-lookup")
    for builder, name in ((made, "fixed"), (made.width("adaptive"), "adaptive")):
        found = plan_ablation([("p", builder)], ["gated-delta"])
        widths = {builder.check().names["width"] for _, builder in found.builders}
        assert {width.partition(" ")[0] for width in widths} == {name}


def test_one_pipeline() -> None:
    made = draftloom.PipelineBuilder(plugins=fakes.plugins()).model(fakes.model()).drafter("none")
    with pytest.raises(UsageError, match="takes one pipeline, 2 are given"):
        plan_ablation([("a", made), ("b", made)])


# --- what they are worth ----------------------------------------------------------------------

OFF = Switch("kernel", "off", removes=True)
ON = Switch("slow", "yes", removes=False)
SAME = Switch("idle", "off", removes=True)


def measured(simulated: bool = False, repeats: int = 3) -> dict[str, Any]:
    """Runs of 10 decoded tokens: as it is 10 a second or so, without the kernel 5, with the slow
    one 8."""
    made = report(simulated)
    tag = " (simulated)" if simulated else ""
    seconds = {
        AS_IT_IS: (1.0, 1.01, 1.02), AGAIN: (1.02, 1.0, 1.01), OFF.name: (2.0, 2.02, 2.04),
        ON.name: (1.25, 1.26, 1.27), SAME.name: (1.0, 1.03, 1.0),
    }  # fmt: skip
    made["settings"]["repeats"] = repeats
    made["variants"] = [{"name": name + tag, "parts": {}} for name in ("mlx-lm", *seconds)]
    made["runs"] = [r for r in made["runs"] if r["variant"] == "mlx-lm"] + [
        run(name + tag, repeat, value, same_tokens=True)
        for name, values in seconds.items()
        for repeat, value in enumerate(values[:repeats])
    ]
    add_worth(made, Ablation((), (OFF, ON, SAME), (("other", "no <such> device"),)))
    return made


def worth(made: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [entry for entry in made["ablation"]["worth"] if entry["switch"] == name]
    return found


@pytest.mark.parametrize("simulated", [False, True])
def test_worth_is_with_it_over_without_it(simulated: bool) -> None:
    made = measured(simulated)
    assert worth(made, OFF.name)["decode"]["median"] == pytest.approx(2.0)
    assert worth(made, ON.name)["decode"]["median"] == pytest.approx(0.8016, abs=1e-3)
    assert [worth(made, s.name)["verdict"] for s in (OFF, ON, SAME)] == [
        "pays", "costs", "within the spread",
    ]  # fmt: skip
    control = worth(made, AGAIN)
    assert control["verdict"] == "control"
    assert control["decode"]["low"] == pytest.approx(1.00 / 1.01)
    assert control["decode"]["high"] == pytest.approx(1.02)
    assert (control["same"], control["compared"]) == (3, 3)


def test_one_repeat_gives_no_verdict() -> None:
    assert worth(measured(repeats=1), OFF.name)["verdict"] == "one repeat: no verdict"


def test_tables_and_page_show_the_losers_too() -> None:
    made = measured()
    ((title, headers, rows),) = worth_tables(made)
    assert title.startswith("11 tokens")
    assert [row[0] for row in rows] == [AGAIN, OFF.name, ON.name, SAME.name]
    assert rows[2][1] == "0.802"
    assert rows[2][-1] == "costs"
    assert len(headers) == len(rows[0])
    page = render_html({**made, "summary": summarize(made), "stages": [], "texts": []})
    title = "what each kernel is worth, 11 tokens"
    (plot,) = [p for p in plots(page) if p.get("aria-label") == title]
    dots = [float(mark.get("cx", "0")) for mark in marks(plot)]
    assert dots[1] > dots[0] > dots[2]
    assert "no &lt;such&gt; device" in page
