"""`draftloom eval drafter` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftloom.apps.train.toy import make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"), steps=1)


def test_drafter_is_judged(cli: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    """One that learned nothing: the pair looks mismatched, and the text is right all the same."""
    for name in ("old", "new"):
        trained = cli(
            "train", "drafter", "--target", toy / "target", "--data", toy / "texts.jsonl",
            "--out", tmp_path / name, "--steps", 1, "--batch", 2, "--context-length", 24,
            "--anchors", 4, "--layers", 1, "--block-size", 4, "--eval-prompts", 0,
        )  # fmt: skip
        assert trained.code == 0, trained.err
    data, page = tmp_path / "r.json", tmp_path / "r.html"
    done = cli(
        "eval", "drafter", "--target", toy / "target", "--drafter", tmp_path / "new",
        "--against", tmp_path / "old", "--data", toy / "texts.jsonl", "--limit", 2, "--tokens", 6,
        "--drafter-bits", 8, "--json", data, "--html", page,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "looks as if it was made for another target" in done.err
    report = json.loads(data.read_text())
    assert report["judged"] == "new"
    names = ["new", "new, 8 bit", "old", "prompt-lookup"]
    assert [e["variant"] for e in report["drafters"]] == names
    for entry in report["drafters"]:
        assert entry["same_text"] == entry["compared"] == 2
        assert entry["by_type"].keys() == {"texts"}
        assert entry["by_type"]["texts"]["tau"] == entry["tau"] >= 1
    assert report["drafters"][0]["speed_up"] > 0
    assert "tau by content type" in done.out
    assert "texts" in page.read_text()


def test_mistakes_are_one_line(cli: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    begin = ("eval", "drafter", "--target", toy / "target")
    cli(*begin, "--drafter", "none").assert_mistake("no drafter of its own")
    cli(*begin, "--drafter", "prompt-lookup", "--suite", "poems").assert_mistake("poems")
    cli(*begin, "--drafter", "prompt-lookup", "--data", tmp_path / "x").assert_mistake("x cannot")
    cli(*begin, "--tokens", 1).assert_mistake("--tokens must be at least 2", hint=False)
