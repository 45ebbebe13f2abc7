"""What each kernel is worth: the pipeline as it is, and once more with each switch the other way.

Worth is the speed with the kernel over the speed without it, in the same repeat: above 1 it pays,
whichever way the switch stands by default. The pipeline as it is runs twice; how far the two are
apart says what the others' ratios can be trusted with.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from draftloom.builder import PipelineBuilder
from draftloom.contracts import TargetInfo
from draftloom.errors import GraphError, UnknownNameError, UsageError
from draftloom.kernel_settings import (
    AUTO,
    OFF,
    Implementation,
    KernelSettings,
    implementations,
)
from draftloom.plugins import canonical

from .report import Report, Spread, speeds, spread
from .subjects import steady

__all__ = ["AGAIN", "AS_IT_IS", "Ablation", "Switch", "add_worth", "plan_ablation"]

AS_IT_IS = "as it is"
AGAIN = "as it is, again"


@attrs.frozen
class Switch:
    """One operation the other way.

    Attributes:
        operation, choice: what is set.
        removes: whether the operation is on in the pipeline as it is.
    """

    operation: str
    choice: str
    removes: bool

    @property
    def name(self) -> str:
        """``operation=choice``, as the command line takes it."""
        return f"{self.operation}={self.choice}"


@attrs.frozen
class Ablation:
    """What is to be measured.

    Attributes:
        builders: the pipeline twice, then one for each switch, by name.
        switches: in the same order.
        left_out: (operation or switch, why it is not measured).
    """

    builders: tuple[tuple[str, PipelineBuilder], ...]
    switches: tuple[Switch, ...]
    left_out: tuple[tuple[str, str], ...]

    def as_data(self) -> Report:
        """As part of a report; `add_worth` fills in the numbers."""
        return {
            "switches": [{"name": s.name, **attrs.asdict(s)} for s in self.switches],
            "left_out": [list(pair) for pair in self.left_out],
        }


def plan_ablation(
    named: Sequence[tuple[str, PipelineBuilder]], only: Sequence[str] = ()
) -> Ablation:
    """Every switch of a pipeline that can be set the other way here.

    Args:
        named: one pipeline with its name; a width that nobody chose is the drafter's own.
        only: operations to look at; none is all.

    Raises:
        UsageError: several pipelines.
        UnknownNameError: an operation that nobody registers.
        ModelError, GraphError: the pipeline cannot be built.
    """
    if len(named) != 1:
        raise UsageError(
            f"--ablate takes one pipeline, {len(named)} are given",
            "give one drafter, width or pipeline file",
        )
    builder = steady(named[0][1])
    plan = builder.check()
    known = implementations(builder.plugins)
    wanted = {canonical(operation) for operation in only}
    for operation in sorted(wanted - {one.operation for one in known}):
        raise UnknownNameError("operation", operation, {one.operation for one in known})
    known = [one for one in known if not wanted or one.operation in wanted]
    switches, left_out = _switches(known, plan.kernels, plan.target)
    builders = [(AS_IT_IS, builder), (AGAIN, builder)]
    kept = []
    for switch in switches:
        changed = builder.kernels({switch.operation: switch.choice})
        try:
            changed.check()
        except GraphError as error:
            left_out.append((switch.name, str(error)))
            continue
        kept.append(switch)
        builders.append((switch.name, changed))
    return Ablation(tuple(builders), tuple(kept), tuple(left_out))


def _switches(
    known: Sequence[Implementation], settings: KernelSettings, target: TargetInfo
) -> tuple[list[Switch], list[tuple[str, str]]]:
    switches: list[Switch] = []
    left_out: list[tuple[str, str]] = []
    for operation in dict.fromkeys(one.operation for one in known):
        own = [one for one in known if one.operation == operation]
        reason = next(filter(None, (one.why_not_for(target) for one in own)), None)
        if reason is not None:
            left_out.append((operation, reason))
            continue
        choice = settings.choice(operation)
        runs = [one for one in own if (one.by_default if choice == AUTO else one.name == choice)]
        if any(not one.stock for one in runs if one.why_not_here is None) and choice != OFF:
            switches.append(Switch(operation, OFF, removes=True))
            continue
        for one in own:
            if one.why_not_here is not None:
                left_out.append((one.full_name, one.why_not_here))
            elif not one.stock and one not in runs:
                switches.append(Switch(operation, one.name, removes=False))
    return switches, left_out


def add_worth(report: Report, ablation: Ablation) -> None:
    """Put under ``ablation`` what each switch is worth at each length, from the report's runs."""
    data = ablation.as_data()
    data["worth"] = []
    for length in report["settings"]["lengths"]:
        control = _ratios(report, AGAIN, length, removes=True)
        data["worth"].append(_entry(report, AGAIN, length, control) | {"verdict": "control"})
        for switch in ablation.switches:
            found = _ratios(report, switch.name, length, removes=switch.removes)
            verdict = _verdict(found["decode"], control["decode"], report["settings"]["repeats"])
            data["worth"].append(
                _entry(report, switch.name, length, found)
                | {"verdict": verdict, "removes": switch.removes}
            )
    report["ablation"] = data


def _runs(report: Report, name: str, length: int) -> list[Report]:
    variant = name + (" (simulated)" if report["simulated"] else "")
    return [r for r in report["runs"] if r["length"] == length and r["variant"] == variant]


def _ratios(report: Report, name: str, length: int, *, removes: bool) -> dict[str, Spread]:
    """Speed with the kernel over speed without it, by phase, of the repeats."""
    base, other = _runs(report, AS_IT_IS, length), _runs(report, name, length)
    found = {}
    for phase in ("decode", "prefill"):
        pairs = zip(speeds(base, phase), speeds(other, phase), strict=True)
        ratios = [(a / b if removes else b / a) for a, b in pairs if a and b]
        found[phase] = spread(ratios or [0.0])
    return found


def _entry(report: Report, name: str, length: int, found: dict[str, Spread]) -> Report:
    known = [r["same_tokens"] for r in _runs(report, name, length) if r["same_tokens"] is not None]
    return {
        "switch": name,
        "length": length,
        **{phase: attrs.asdict(ratio) for phase, ratio in found.items()},
        "same": sum(known),
        "compared": len(known),
    }


def _verdict(found: Spread, control: Spread, repeats: int) -> str:
    if repeats < 2:
        return "one repeat: no verdict"
    if found.low > 1 and found.median > control.high:
        return "pays"
    if found.high < 1 and found.median < control.low:
        return "costs"
    return "within the spread"
