"""What the `draftloom` command does before it looks at its arguments."""

import os
import sys

import pytest

from draftloom.apps.cli import app


@pytest.mark.parametrize(
    ("platform", "before", "after"),
    [("linux", None, "120"), ("linux", "7", "7"), ("darwin", None, None)],
    ids=["linux", "chosen by the user", "macos"],
)
def test_how_many_launches_mlx_hands_over_at_once(
    platform: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str | None] = []

    def run() -> int:
        found.append(os.environ.get(app.LAUNCHES_AT_ONCE))
        return 3

    monkeypatch.delenv(app.LAUNCHES_AT_ONCE, raising=False)
    if before is not None:
        monkeypatch.setenv(app.LAUNCHES_AT_ONCE, before)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(app, "run", run)
    try:
        with pytest.raises(SystemExit) as end:
            app.main()
    finally:
        if before is None:
            os.environ.pop(app.LAUNCHES_AT_ONCE, None)
    assert found == [after]
    assert end.value.code == 3
