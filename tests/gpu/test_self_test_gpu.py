"""`doctor --self-test` on the GPU that is here: every kernel that it runs is checked and passes."""

from pathlib import Path

import pytest

from draftloom.apps.self_test import run_self_test
from draftloom.apps.self_test_side_by_side import processes_here
from draftloom.kernel_settings import implementations
from draftloom.plugins import PluginManager

pytestmark = pytest.mark.gpu


def test_everything_passes_in_under_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    plugins = PluginManager(entry_points=False)
    found = run_self_test(plugins, processes=processes_here())
    failed = [str(check) for one in found.tested for check in one.failed]
    assert failed == []
    assert found.seconds < 60
    here = {one.full_name for one in implementations(plugins) if one.why_not_here is None}
    tested = {one.kernel for one in found.tested if not one.skipped}
    assert {name for name in here if name.endswith(("/cuda", "/metal"))} <= tested
