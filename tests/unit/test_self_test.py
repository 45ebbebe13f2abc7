"""`doctor --self-test`: every kernel is checked where it lives, and what fails is turned off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest
from typer.testing import CliRunner

import draftloom
from draftloom import GraphError, KernelSettings
from draftloom.apps import self_test_side_by_side
from draftloom.apps.cli import build_app
from draftloom.apps.cli.state import CliState
from draftloom.apps.self_test import check_kernel, run_self_test
from draftloom.apps.self_test_report import KernelReport, SelfTest
from draftloom.caches.trim import TrimRollback
from draftloom.kernel_settings import implementations
from draftloom.kernels.check import Check, difference
from draftloom.kernels.gated_delta import array
from draftloom.kernels.gated_delta.checks import checks_of
from draftloom.self_test_record import SelfTestRecord, fingerprint, record_file

from . import fakes


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "draftloom"


class Broken:
    """A gated delta rule whose states are a little off."""

    name = "my-lab.broken"

    def supports(self, request: Any) -> str | None:
        return "it has none" if request.operation == "replay_verify" else None

    def verify(self, *block: Any, write_state: bool = True) -> Any:
        y, tape, end = array.verify(*block)
        return y, tape, 1.001 * end

    def replay(self, *given: Any) -> mx.array:
        return array.replay(*given)

    def prefill(self, *block: Any) -> tuple[mx.array, mx.array]:
        return array.prefill(*block)

    def checks(self) -> Iterator[Check]:
        return checks_of(self)


class Other:
    """An implementation of an operation of its own, which `auto` runs here."""

    def __init__(self, *checks: Check) -> None:
        self._checks = checks

    def by_default(self) -> bool:
        return True

    def checks(self) -> tuple[Check, ...]:
        return self._checks


class Told(TrimRollback):
    """A rollback that keeps the settings it was tuned with."""

    info = attrs.evolve(TrimRollback.info, name="my-lab.told")
    settings = KernelSettings()

    def tune(self, settings: KernelSettings) -> None:
        type(self).settings = settings


class Lab:
    """A third party's plugin."""

    def __init__(self, **kernels: Any) -> None:
        self.kernels = kernels

    @draftloom.hookimpl
    def register_kernels(self, register: Any) -> None:
        for name, kernel in self.kernels.items():
            full = name.replace("__", "/").replace("_", "-").replace("my-lab-", "my-lab.")
            register(full, kernel, draftloom.ComponentInfo(full, "of a third party"))

    @draftloom.hookimpl
    def register_cache_rollbacks(self, register: Any) -> None:
        register("my-lab.told", Told)


def check(found: Any, expected: Any = 1.0, tolerance: float = 0.1, name: str = "one") -> Check:
    def arrays(value: Any) -> list[mx.array]:
        if isinstance(value, Exception):
            raise value
        return [mx.array(value)]

    return Check(name, lambda: arrays(found), lambda: arrays(expected), (tolerance,))


def named(test: Any, kernel: str) -> Any:
    (found,) = [one for one in test.tested if one.kernel == kernel]
    return found


def report_of(kernel: Any) -> KernelReport:
    plugins = fakes.plugins(Lab(my_lab_op__fast=kernel))
    (found,) = [o for o in implementations(plugins) if o.full_name == "my-lab.op/fast"]
    return check_kernel(found)


def command(plugins: Any, *arguments: str) -> Any:
    app = build_app(CliState(plugins))
    return CliRunner().invoke(app, ["doctor", *arguments])


# --- checks -----------------------------------------------------------------------------------


def test_everything_that_runs_here_is_checked_and_passes() -> None:
    found = run_self_test(fakes.plugins())
    assert found.passed
    assert found.seconds < 60
    here = [one for one in implementations(fakes.plugins()) if one.why_not_here is None]
    checkable = {one.full_name for one in here if hasattr(one.factory, "checks")}
    assert {one.kernel for one in found.tested if not one.skipped} == checkable
    assert {"gated-delta/array", "ssm/block", "fixed-length-caches/allocated"} <= checkable
    assert all(one.checks for one in found.tested if not one.skipped)
    rule = [check.name for check in named(found, "gated-delta/array").checks]
    for word in ("verify", "replay", "prefill", "replay_verify", "float16", "masked", "B3"):
        assert any(word in name for name in rule), word
    exact = [c for c in named(found, "gated-delta/array").checks if "bits of verify" in c.name]
    assert exact
    assert all((c.error, c.tolerance) == (0.0, 0.0) for c in exact)


def test_the_largest_difference_over_the_largest_value() -> None:
    assert difference(mx.array([1.0, 4.0]), mx.array([1.0, 5.0])) == pytest.approx(0.2)
    assert difference(mx.array([1.0, mx.nan]), mx.array([1.0, 1.0])) == float("inf")
    assert difference(mx.zeros((0,)), mx.zeros((0,))) == 0.0


def test_the_worst_array_counts() -> None:
    ones = mx.ones((2,))
    both = Check("two", lambda: [1.2 * ones, 1.001 * ones], lambda: [ones, ones], (0.5, 1e-4))
    outcome = both.run()
    assert not outcome.passed
    assert outcome.error == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (1.3, "error 0.3, allowed 0.1"),
        ([1.0, 1.0], "gives shapes [(2,)], the reference [()]"),
        (RuntimeError("no such\ndevice"), "RuntimeError: no such device"),
    ],
)
def test_ways_to_fail(found: Any, words: str) -> None:
    one = report_of(Other(check(1.05), check(found, name="two")))
    (failed,) = one.failed
    assert words in str(failed)
    test = SelfTest(fingerprint(), "", 0.0, (one,))
    assert "two" in test.record().failed["my-lab.op/fast"]
    assert not test.passed


def test_checks_that_cannot_be_made_are_a_failure() -> None:
    class Bad(Other):
        def checks(self) -> Any:
            yield check(1.0)
            raise ValueError("no shapes")

    assert [c.passed for c in report_of(Bad()).checks] == [True, False]


def test_what_was_not_run_says_why() -> None:
    class Elsewhere(Other):
        def why_not_here(self) -> str:
            return "no such device"

    assert report_of(Elsewhere(check(2.0))).skipped == "no such device"
    assert report_of(object()).skipped == "it brings no checks"


def test_after_its_time_nothing_is_begun_and_all_stays_as_it_was() -> None:
    plugins = fakes.plugins(Lab(my_lab_op__fast=Other(check(2.0))))
    found = run_self_test(plugins, seconds=0.0)
    run = [c for one in found.tested for c in one.checks if not c.left_out]
    assert run == []
    assert found.passed
    before = SelfTestRecord(fingerprint(), "2026-01-01", {"my-lab.op/fast": "it was off"})
    assert found.record(before).failed == before.failed
    assert found.record().failed == {}
    assert "not run (time)" in str(named(found, "my-lab.op/fast").checks[0])
    again = run_self_test(fakes.plugins(Lab(my_lab_op__fast=Other(check(1.0)))))
    assert again.record(before).failed == {}


def test_the_time_runs_from_the_command_on() -> None:
    state = CliState(fakes.plugins(Lab(my_lab_op__fast=Other(check(1.0)))))
    state.begin -= 1e3  # as if importing had taken that long
    done = CliRunner().invoke(build_app(state), ["doctor", "--self-test", "--json"])
    found = json.loads(done.stdout)
    assert found["seconds"] > 1e3
    checks = [one for kernel in found["tested"] for one in kernel["checks"]]
    assert checks
    assert all(one["left_out"] for one in checks)


def test_checks_that_are_the_same_are_run_once() -> None:
    told: list[str] = []
    found = run_self_test(fakes.plugins(), told.append)
    both = [named(found, f"packed-projections/{name}").checks for name in ("packed", "mlp")]
    assert set(both[1]) < set(both[0])
    assert sum("mlp float32" in what for what in told) == 1


# --- turned off -------------------------------------------------------------------------------


def test_a_broken_kernel_of_a_third_party_is_turned_off() -> None:
    plugins = fakes.plugins(Lab(gated_delta__my_lab_broken=Broken()))
    made = draftloom.PipelineBuilder(plugins=plugins).model(fakes.model("hybrid"))
    made = made.drafter("none").kernels({"gated-delta": "my-lab.broken"})
    made.check()
    done = command(plugins, "--self-test")
    assert done.exit_code == 1
    assert "FAILED: gated-delta/my-lab.broken; turned off on this device" in done.output
    assert "FAILED  verify float32 B2 T5 Hk2 Hv4 32x64: error 0.001" in done.output
    with pytest.raises(GraphError, match=r"my-lab.broken failed the self-test here: verify"):
        made.check()
    shown = command(plugins).output
    assert "FAILED gated-delta/my-lab.broken" in shown
    made.kernels({"gated-delta": "auto"}).check()  # the others are as they were


def test_auto_runs_the_stock_path_instead_and_says_so() -> None:
    lab = Lab(my_lab_op__fast=Other(check(2.0)))
    plugins = fakes.plugins(lab)
    made = draftloom.PipelineBuilder(plugins=plugins).model(fakes.model())
    made = made.drafter("none").rollback("my-lab.told")
    made.build().close()
    assert Told.settings.choice("my-lab.op") == "auto"
    failed = report_of(Other(check(2.0)))
    SelfTest(fingerprint(), "", 0.0, (failed,)).record().save()
    with made.build() as pipeline:
        assert "my-lab.op is off: my-lab.op/fast failed the self-test" in pipeline.describe()
    assert Told.settings.is_off("my-lab.op")
    assert pipeline.spec.kernels.choices == ()  # the file says what the user chose
    repaired = report_of(Other(check(1.0)))
    SelfTest(fingerprint(), "", 0.0, (repaired,)).record().save()
    assert "self-test" not in attrs_of(plugins)


def test_a_draft_model_does_not_run_what_failed_either() -> None:
    from draftloom.api import _adapt

    plugins = fakes.plugins()
    plain = _adapt(plugins, fakes.model("hybrid"))
    mixers = [layer.linear_attn for layer in plain.model.layers if layer.is_linear]
    assert {mixer._use for mixer in mixers} == {None}
    plain.close()
    failed = {"gated-delta/slow": "verify: error 1, allowed 0"}
    lab = Lab(gated_delta__slow=Other(check(2.0)))  # one that auto would run
    SelfTestRecord(fingerprint(), "2026-01-01", failed).save()
    careful = _adapt(fakes.plugins(lab), fakes.model("hybrid"))
    mixers = [layer.linear_attn for layer in careful.model.layers if layer.is_linear]
    assert {mixer._use.implementation for mixer in mixers} == {"array"}
    careful.close()


def attrs_of(plugins: Any) -> str:
    made = draftloom.PipelineBuilder(plugins=plugins).model(fakes.model()).drafter("none")
    return made.check().graph.describe()


def test_what_off_means_has_no_replacement() -> None:
    failed = {"gated-delta/array": "verify: error 1, allowed 0"}
    SelfTestRecord(fingerprint(), "2026-01-01", failed).save()
    shown = attrs_of(fakes.plugins())
    assert "gated-delta/array failed the self-test" in shown
    assert "has no replacement" in shown


@pytest.mark.parametrize(
    ("key", "words"), [("device", "made for device a chip"), ("mlx", "made for mlx a chip")]
)
def test_a_record_of_another_device_is_left_aside_and_said(key: str, words: str) -> None:
    failed = {"ssm/stepwise": "verify: error 1, allowed 0"}
    SelfTestRecord(fingerprint() | {key: "a chip"}, "2026-01-01", failed).save()
    shown = attrs_of(fakes.plugins())
    assert "record is left aside" in shown
    assert words in shown
    assert "ssm is off" not in shown
    SelfTestRecord(fingerprint(), "2026-01-01", failed).save()
    assert "ssm is off: ssm/stepwise failed" in attrs_of(fakes.plugins())


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 2, "made_for": {}}'])
def test_a_record_that_cannot_be_read_is_said(text: str, config_home: Path) -> None:
    config_home.mkdir()
    assert record_file() == config_home / "self-test.json"
    record_file().write_text(text)
    assert "cannot be read" in attrs_of(fakes.plugins())


def test_no_record_no_word() -> None:
    assert SelfTestRecord.load() is None
    assert "self-test" not in attrs_of(fakes.plugins())


# --- the command ------------------------------------------------------------------------------


def test_the_report_as_data(config_home: Path) -> None:
    nan = Other(check(float("nan")))
    done = command(fakes.plugins(Lab(my_lab_op__fast=nan)), "--self-test", "--json")
    assert done.exit_code == 1
    data = json.loads(done.stdout)
    assert data["passed"] is False
    assert data["record"] == str(config_home / "self-test.json")
    (one,) = [one for one in data["tested"] if one["kernel"] == "my-lab.op/fast"]
    assert one["checks"][0]["error"] is None
    assert one["checks"][0]["failure"] == "a value is not finite"
    assert data["made_for"] == fingerprint()
    assert "mlx" in data["versions"]


def test_the_report_to_paste() -> None:
    done = command(fakes.plugins(), "--self-test")
    assert done.exit_code == 0
    assert "s  gated-delta/array: verify float32 B2 T5" in done.stderr
    lines = done.stdout.splitlines()
    assert "kernels of draftloom's compiled: 0" in lines
    assert lines[0].startswith("draftloom self-test of ")
    assert lines[1].startswith("device ")
    assert "all passed: nothing is turned off" in lines
    assert any(line.startswith("gated-delta/metal: not run, MLX was built") for line in lines)
    assert "all passed" in command(fakes.plugins()).output


def test_processes_that_could_not_begin_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test_side_by_side, "processes_here", lambda: 2)
    monkeypatch.setattr(self_test_side_by_side, "WORK", "no_such_module_of_a_test:serve")
    done = command(fakes.plugins(), "--self-test")
    assert done.exit_code == 1
    assert "processes ended before they could begin" in " ".join(done.stdout.split())
    assert "all passed" not in done.stdout
    assert SelfTestRecord.load() is not None
    assert "FAILED" not in done.stdout


def test_it_takes_no_target() -> None:
    done = command(fakes.plugins(), "--self-test", "--dtype", "float32")
    assert done.exit_code != 0
    assert "not a target" in str(done.exception)


def test_a_record_that_cannot_be_written(config_home: Path) -> None:
    config_home.write_text("a file where the folder belongs")
    with pytest.raises(draftloom.UsageError, match="cannot be written"):
        SelfTest(fingerprint(), "", 0.0, ()).record().save()
