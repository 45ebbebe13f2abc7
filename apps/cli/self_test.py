"""`draftloom doctor --self-test`: the report to paste into an issue."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from draftloom.apps.self_test_report import KernelReport, SelfTest
    from draftloom.plugins import PluginManager

__all__ = ["self_test"]


def self_test(
    plugins: PluginManager, versions: dict[str, str], begin: float, *, as_json: bool
) -> None:
    """Run all checks, write the record, print the report.

    Args:
        plugins: whose kernels.
        versions: what is installed, for the report.
        begin: when, by `time.perf_counter`, the command began: its time runs from there.
        as_json: print JSON.

    Raises:
        UsageError: the record cannot be written.
        Exit: code 1 where something failed, or could not be begun.
    """
    from draftloom.apps.self_test import run_self_test
    from draftloom.apps.self_test_side_by_side import processes_here
    from draftloom.self_test_record import SelfTestRecord

    def say(what: str) -> None:
        typer.echo(f"{time.perf_counter() - begin:5.1f} s  {what}", err=True)

    found = run_self_test(plugins, say, processes=processes_here(), begin=begin)
    file = found.record(SelfTestRecord.load()).save()
    if as_json:
        data: dict[str, Any] = {**found.as_dict(), "versions": versions, "record": str(file)}
        typer.echo(json.dumps(data, indent=2))
    else:
        typer.echo("\n".join([*_lines(found, versions), f"written to {file}"]))
    if not found.passed or found.unable:
        raise typer.Exit(1)


def _lines(found: SelfTest, versions: dict[str, str]) -> list[str]:
    made = found.made_for
    lines = [f"draftloom self-test of {found.date}, {found.seconds:.1f} s"]
    lines.append(f"device {made['device']} ({made['backend']})")
    lines.append(", ".join(f"{name} {value}" for name, value in versions.items()))
    lines.append(f"kernels of draftloom's compiled: {found.kernels_built}")
    for one in found.tested:
        lines += _of(one)
    failed = [one.kernel for one in found.tested if one.failed]
    if found.unable:
        lines.append(
            f"not wholly run: {', '.join(found.unable)}; those stay as they were. Their "
            "processes ended before they could begin; what they said is above"
        )
    if found.late:
        lines.append(
            f"not wholly run, for want of time: {', '.join(found.late)}; those stay as they were. "
            "What still compiles goes on, and is kept: run it again in some minutes"
        )
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}; turned off on this device")
    else:
        whole = not found.late and not found.unable
        lines.append("all passed: nothing is turned off" if whole else "what was run passed")
    return lines


def _of(one: KernelReport) -> list[str]:
    if one.skipped:
        return [f"{one.kernel}: not run, {one.skipped}"]
    passed = sum(check.passed for check in one.checks)
    auto = ", auto runs it" if one.by_default else ""
    lines = [f"{one.kernel}: {passed} of {len(one.checks)} passed, {one.seconds:.1f} s{auto}"]
    for check in one.checks:
        word = "ok" if check.passed else "--" if check.left_out else "FAILED"
        lines.append(f"  {word}  {check}")
    return lines
