"""All parity checks of kernels on this device, and the record that turns off what fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import attrs

from draftloom.kernel_settings import Implementation, implementations
from draftloom.kernels.backend import kernels_built
from draftloom.plugins import PluginManager
from draftloom.self_test_record import fingerprint

from .self_test_report import (
    NO_TIME,
    CheckResult,
    KernelReport,
    SelfTest,
    in_words,
    run_check,
)
from .self_test_side_by_side import Item, get_ready, in_turns, run_side_by_side

__all__ = ["SECONDS", "check_kernel", "run_self_test"]

SECONDS = 50.0
"""After so long no further check is begun."""

Tell = Callable[[str], None]


def run_self_test(
    plugins: PluginManager,
    progress: Tell = lambda what: None,
    seconds: float = SECONDS,
    processes: int = 1,
    begin: float | None = None,
) -> SelfTest:
    """Run every check of every registered implementation that this device can run.

    Args:
        plugins: whose kernels.
        progress: told what runs next, check by check.
        seconds: after which no check is begun.
        processes: how many run checks side by side; 1 is this one. Others load the plugins that are
            installed; what they do not know is checked here.
        begin: when, by `time.perf_counter`, the time began to run: a process that has just started
            may have imported for many seconds. By default, now.

    Raises:
        PluginError: an implementation cannot be imported.
    """
    begin = time.perf_counter() if begin is None else begin
    built = kernels_built()
    if processes > 1:
        get_ready()
    known = implementations(plugins)
    order, until = sorted(known, key=_turn), begin + seconds
    if processes > 1:
        reports, elsewhere = _side_by_side(order, processes, until, progress)
    else:
        reports, elsewhere = _in_a_row(order, until, progress), 0
    tested = tuple(reports[one.full_name] for one in known)
    took = time.perf_counter() - begin
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return SelfTest(fingerprint(), date, took, tested, kernels_built() - built + elsewhere)


def _in_a_row(
    order: Sequence[Implementation], until: float, progress: Tell
) -> dict[str, KernelReport]:
    """Every kernel has a share of the time, in proportion to its checks, and what those before it
    did not use. Checks that find none left are not run."""
    reports: dict[str, KernelReport] = {}
    shared: dict[str, CheckResult] = {}
    weights = [_weight(one) for one in order]
    for place, one in enumerate(order):
        now = time.perf_counter()
        share = weights[place] / (sum(weights[place:]) or 1.0)
        end = now + share * (until - now)
        reports[one.full_name] = check_kernel(one, progress, end, shared)
    return reports


def _side_by_side(
    order: Sequence[Implementation], processes: int, until: float, progress: Tell
) -> tuple[dict[str, KernelReport], int]:
    """Kernels take turns, check by check, those with much to compile last. With the reports: how
    many kernels the other processes compiled."""
    reports: dict[str, KernelReport] = {}
    listed: dict[str, list[Item]] = {}
    for one in order:
        name = one.full_name
        skipped = _why_no_checks(one)
        reports[name] = KernelReport(name, skipped, one.by_default)
        if skipped:
            continue
        try:
            checks = list(one.factory.checks())
        except Exception as error:  # noqa: BLE001 - a kernel that cannot be checked has failed
            failure = CheckResult("checks", None, None, in_words(error))
            reports[name] = KernelReport(name, "", one.by_default, 0.0, (failure,))
            continue
        listed[name] = [Item(name, index, check) for index, check in enumerate(checks)]
    slow = {one.full_name for one in order if getattr(one.factory, "SLOW_CHECKS", False)}
    items = [
        *in_turns(items for name, items in listed.items() if name not in slow),
        *in_turns(items for name, items in listed.items() if name in slow),
    ]
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.same, item)
    ran = dict(
        zip(first, run_side_by_side(list(first.values()), processes, until, progress), strict=True)
    )
    for one in order:
        if one.full_name in listed:
            mine = listed[one.full_name]
            found = [attrs.evolve(ran[i.same].result, name=i.check.name) for i in mine]
            took = sum(ran[i.same].seconds for i in mine if first[i.same] is i)
            reports[one.full_name] = KernelReport(
                one.full_name, "", one.by_default, took, tuple(found)
            )
    return reports, sum(one.built for one in ran.values())


def check_kernel(
    implementation: Implementation,
    progress: Tell = lambda what: None,
    until: float = float("inf"),
    shared: dict[str, CheckResult] | None = None,
) -> KernelReport:
    """Run every check of one implementation, if this device can run it.

    Args:
        implementation: whose.
        progress: told what runs next.
        until: when, by `time.perf_counter`, no further check is begun.
        shared: results of checks that other implementations have too; added to.
    """
    name, default = implementation.full_name, implementation.by_default
    skipped = _why_no_checks(implementation)
    if skipped:
        return KernelReport(name, skipped, default)
    begin, results = time.perf_counter(), list[CheckResult]()
    shared = {} if shared is None else shared
    try:
        for check in implementation.factory.checks():
            found = shared.get(check.same)
            if found is None and time.perf_counter() >= until:
                results.append(CheckResult(check.name, None, None, left_out=NO_TIME))
                continue
            if found is None:
                progress(f"{name}: {check.name}")
                found = run_check(check)
            results.append(found)
            if check.same:
                shared[check.same] = found
    except Exception as error:  # noqa: BLE001 - a kernel that cannot be checked is one that failed
        results.append(CheckResult("checks", None, None, in_words(error)))
    return KernelReport(name, "", default, time.perf_counter() - begin, tuple(results))


def _why_no_checks(implementation: Implementation) -> str:
    """Why nothing of it is run; empty where something is."""
    if implementation.why_not_here is not None:
        return implementation.why_not_here
    return "" if hasattr(implementation.factory, "checks") else "it brings no checks"


def _turn(implementation: Implementation) -> tuple[bool, bool, bool]:
    """Kernels that are compiled go first: they are what a device may have wrong. Checks that have
    much to compile besides go last, those of what runs here by default before the others."""
    one = implementation.factory
    slow = getattr(one, "SLOW_CHECKS", False)
    return slow, not hasattr(one, "BACKEND"), not implementation.by_default


def _weight(implementation: Implementation) -> float:
    """Of its share of the time: checks of a kernel that is compiled; others take little."""
    one = implementation.factory
    if implementation.why_not_here is not None or not hasattr(one, "checks"):
        return 0.0
    if not hasattr(one, "BACKEND"):
        return 1.0
    try:
        return float(sum(1 for _ in one.checks()))
    except Exception:  # noqa: BLE001 - `check_kernel` reports it
        return 1.0
