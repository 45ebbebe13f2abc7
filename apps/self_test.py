"""All parity checks of kernels on this device, and the record that turns off what fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import attrs

from draftloom.kernel_settings import Implementation, implementations
from draftloom.kernels.backend import kernels_built
from draftloom.kernels.check import Check
from draftloom.plugins import PluginManager
from draftloom.self_test_record import SelfTestRecord, fingerprint

__all__ = ["SECONDS", "CheckResult", "KernelReport", "SelfTest", "check_kernel", "run_self_test"]

SECONDS = 50.0
"""After so long no further check is begun."""
NO_TIME = "not run (time)"


@attrs.frozen
class CheckResult:
    """One check.

    Attributes:
        name: of the check.
        error: largest difference over the largest value; None where it could not be run.
        tolerance: the largest allowed; None likewise.
        failure: what was raised; empty where nothing was.
        left_out: why it was not run; empty where it was.
    """

    name: str
    error: float | None
    tolerance: float | None
    failure: str = ""
    left_out: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran, and within its tolerance."""
        if self.failure or self.error is None or self.tolerance is None:
            return False
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if self.left_out:
            return f"{self.name}: {self.left_out}"
        if self.failure:
            return f"{self.name}: {self.failure}"
        return f"{self.name}: error {self.error:.2g}, allowed {self.tolerance:.2g}"


@attrs.frozen
class KernelReport:
    """One implementation.

    Attributes:
        kernel: ``operation/implementation``.
        skipped: why nothing was run; empty where something was.
        by_default: whether ``auto`` runs it here.
        seconds: that its checks took.
        checks: their results.
    """

    kernel: str
    skipped: str
    by_default: bool
    seconds: float = 0.0
    checks: tuple[CheckResult, ...] = ()

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """The checks that were run and did not pass."""
        return tuple(c for c in self.checks if not c.passed and not c.left_out)

    @property
    def left_out(self) -> tuple[CheckResult, ...]:
        """The checks that were not run."""
        return tuple(check for check in self.checks if check.left_out)


@attrs.frozen
class SelfTest:
    """A whole self-test.

    Attributes:
        made_for: device, backend and versions.
        date: ISO 8601.
        seconds: wall time.
        tested: every registered implementation.
        kernels_built: kernels of draftloom's that were compiled, or found compiled.
    """

    made_for: dict[str, str]
    date: str
    seconds: float
    tested: tuple[KernelReport, ...]
    kernels_built: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(one.failed for one in self.tested)

    def record(self, before: SelfTestRecord | None = None) -> SelfTestRecord:
        """What pipelines are to know of it.

        Args:
            before: the record so far: what failed there, and was not wholly run now, stays as it
                was.
        """
        failed = {}
        for one in self.tested:
            if one.left_out and before is not None and one.kernel in before.failed:
                failed[one.kernel] = before.failed[one.kernel]
            if one.failed:
                more = len(one.failed) - 1
                failed[one.kernel] = str(one.failed[0]) + (f" and {more} more" if more else "")
        return SelfTestRecord(self.made_for, self.date, failed)

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; an error that is not finite is null, with the reason beside it."""
        data = attrs.asdict(self)
        for one, shown in zip(self.tested, data["tested"], strict=True):
            shown["passed"] = not one.failed
            for check, entry in zip(one.checks, shown["checks"], strict=True):
                entry["passed"] = check.passed
                if check.error is not None and check.error == float("inf"):
                    entry |= {"error": None, "failure": "a value is not finite"}
        return {"passed": self.passed, **data}


def run_self_test(
    plugins: PluginManager,
    progress: Callable[[str], None] = lambda what: None,
    seconds: float = SECONDS,
) -> SelfTest:
    """Run every check of every registered implementation that this device can run.

    Every kernel has a share of the time, in proportion to its checks, and what those before it did
    not use. Checks that find none left are not run.

    Args:
        plugins: whose kernels.
        progress: told what runs next, check by check.
        seconds: after which no check is begun.

    Raises:
        PluginError: an implementation cannot be imported.
    """
    begin, built = time.perf_counter(), kernels_built()
    known = implementations(plugins)
    reports: dict[str, KernelReport] = {}
    shared: dict[str, CheckResult] = {}
    order = sorted(known, key=_turn)
    weights = [_weight(one) for one in order]
    for place, one in enumerate(order):
        now = time.perf_counter()
        share = weights[place] / (sum(weights[place:]) or 1.0)
        until = now + share * (begin + seconds - now)
        reports[one.full_name] = check_kernel(one, progress, until, shared)
    tested = tuple(reports[one.full_name] for one in known)
    took = time.perf_counter() - begin
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return SelfTest(fingerprint(), date, took, tested, kernels_built() - built)


def check_kernel(
    implementation: Implementation,
    progress: Callable[[str], None] = lambda what: None,
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
    if implementation.why_not_here is not None:
        return KernelReport(name, implementation.why_not_here, default)
    checks = getattr(implementation.factory, "checks", None)
    if checks is None:
        return KernelReport(name, "it brings no checks", default)
    begin, results = time.perf_counter(), list[CheckResult]()
    shared = {} if shared is None else shared
    try:
        for check in checks():
            found = shared.get(check.same)
            if found is None and time.perf_counter() >= until:
                results.append(CheckResult(check.name, None, None, left_out=NO_TIME))
                continue
            if found is None:
                progress(f"{name}: {check.name}")
                found = _run(check)
            results.append(found)
            if check.same:
                shared[check.same] = found
    except Exception as error:  # noqa: BLE001 - a kernel that cannot be checked is one that failed
        results.append(CheckResult("checks", None, None, _words(error)))
    return KernelReport(name, "", default, time.perf_counter() - begin, tuple(results))


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


def _run(check: Check) -> CheckResult:
    try:
        outcome = check.run()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its failure, reported
        return CheckResult(check.name, None, None, _words(error))
    return CheckResult(check.name, outcome.error, outcome.tolerance)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
