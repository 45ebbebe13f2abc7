"""What a self-test found, check by check, and what pipelines are to know of it."""

from __future__ import annotations

from typing import Any

import attrs

from draftloom.kernels.check import Check
from draftloom.self_test_record import SelfTestRecord

__all__ = [
    "NO_PROCESS",
    "NO_TIME",
    "CheckResult",
    "KernelReport",
    "Ran",
    "SelfTest",
    "in_words",
    "run_check",
]

NO_TIME = "not run (time)"
NO_PROCESS = "not run (no process could be started for it; what it said is above)"


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
class Ran:
    """How a check went, and the seconds and newly compiled kernels that it took."""

    result: CheckResult
    seconds: float = 0.0
    built: int = 0


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
        kernels_built: kernels of draftloom's that were compiled; not those found compiled on disk.
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

    @property
    def late(self) -> list[str]:
        """Kernels of which a check was not run for want of time."""
        return self._left_out(NO_TIME)

    @property
    def unable(self) -> list[str]:
        """Kernels of which a check was not run since no process could be started for it."""
        return self._left_out(NO_PROCESS)

    def _left_out(self, reason: str) -> list[str]:
        why = {one.kernel: [check.left_out for check in one.left_out] for one in self.tested}
        return [kernel for kernel, reasons in why.items() if reason in reasons]

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


def run_check(check: Check) -> CheckResult:
    """Run one check here."""
    try:
        outcome = check.run()
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its failure, reported
        return CheckResult(check.name, None, None, in_words(error))
    return CheckResult(check.name, outcome.error, outcome.tolerance)


def in_words(error: Exception) -> str:
    """Its type and message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
