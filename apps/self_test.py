"""All parity checks of kernels on this device, and the record that turns off what fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import attrs

from draftloom.kernel_settings import Implementation, implementations
from draftloom.kernels.check import Check
from draftloom.plugins import PluginManager
from draftloom.self_test_record import SelfTestRecord, fingerprint

__all__ = ["CheckResult", "KernelReport", "SelfTest", "check_kernel", "run_self_test"]


@attrs.frozen
class CheckResult:
    """One check.

    Attributes:
        name: of the check.
        error: largest difference over the largest value; None where it could not be run.
        tolerance: the largest allowed; None likewise.
        failure: what was raised; empty where nothing was.
    """

    name: str
    error: float | None
    tolerance: float | None
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran, and within its tolerance."""
        if self.failure or self.error is None or self.tolerance is None:
            return False
        return self.error <= self.tolerance

    def __str__(self) -> str:
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
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)


@attrs.frozen
class SelfTest:
    """A whole self-test.

    Attributes:
        made_for: device, backend and versions.
        date: ISO 8601.
        seconds: wall time.
        tested: every registered implementation.
    """

    made_for: dict[str, str]
    date: str
    seconds: float
    tested: tuple[KernelReport, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(one.failed for one in self.tested)

    def record(self) -> SelfTestRecord:
        """What pipelines are to know of it."""
        failed = {}
        for one in self.tested:
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
    plugins: PluginManager, progress: Callable[[str], None] = lambda what: None
) -> SelfTest:
    """Run every check of every registered implementation that this device can run.

    Args:
        plugins: whose kernels.
        progress: told what runs next.

    Raises:
        PluginError: an implementation cannot be imported.
    """
    begin = time.perf_counter()
    tested = []
    for implementation in implementations(plugins):
        progress(implementation.full_name)
        tested.append(check_kernel(implementation))
    seconds = time.perf_counter() - begin
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return SelfTest(fingerprint(), date, seconds, tuple(tested))


def check_kernel(implementation: Implementation) -> KernelReport:
    """Run every check of one implementation, if this device can run it."""
    name, default = implementation.full_name, implementation.by_default
    if implementation.why_not_here is not None:
        return KernelReport(name, implementation.why_not_here, default)
    checks = getattr(implementation.factory, "checks", None)
    if checks is None:
        return KernelReport(name, "it brings no checks", default)
    begin, results = time.perf_counter(), list[CheckResult]()
    try:
        results.extend(_run(check) for check in checks())
    except Exception as error:  # noqa: BLE001 - a kernel that cannot be checked is one that failed
        results.append(CheckResult("checks", None, None, _words(error)))
    return KernelReport(name, "", default, time.perf_counter() - begin, tuple(results))


def _run(check: Check) -> CheckResult:
    try:
        outcome = check.run()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its failure, reported
        return CheckResult(check.name, None, None, _words(error))
    return CheckResult(check.name, outcome.error, outcome.tolerance)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
