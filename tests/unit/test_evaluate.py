"""What the runs of a benchmark say of a drafter."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftloom.apps.bench.measure import repeated_share
from draftloom.apps.evaluate.judge import judge, warnings_of
from draftloom.apps.evaluate.output import judgement_html
from draftloom.apps.evaluate.prompts import data_prompts
from draftloom.errors import UsageError


def run(variant: str, prompt: int, suite: str, **facts: Any) -> dict[str, Any]:
    base = {
        "cycles": 0,
        "accepted": 0,
        "verified": 0,
        "repeated": 0.0,
        "fell_back": "",
        "mismatch": "",
    }
    return {"variant": variant, "prompt": prompt, "suite": suite, **base, **facts}


def report(runs: list[dict[str, Any]], ratio: float = 2.0) -> dict[str, Any]:
    names = list(dict.fromkeys(r["variant"] for r in runs))
    entry = {"suite": "all", "by_position": [0.8, 0.4], "ratio": {"median": ratio}, "same": 3,
             "compared": 3, "fell_back": ""}  # fmt: skip
    return {
        "variants": [{"name": name} for name in names],
        "runs": runs,
        "summary": [{"variant": name, **entry} for name in names],
    }


RUNS = [
    run("mlx-lm", 0, "code"),
    run("mine", 0, "code", cycles=10, accepted=30, verified=150, repeated=0.0),
    run("mine", 1, "code", cycles=10, accepted=10, verified=150, repeated=0.2),
    run("mine", 2, "chat", cycles=2, accepted=26, verified=30, repeated=0.9),
]


def test_share_of_repeated_eight_grams() -> None:
    assert repeated_share(range(20)) == 0
    assert repeated_share([1] * 10) == pytest.approx(2 / 3)  # 3 of them, one alone
    assert repeated_share([*range(8), *range(8)]) == pytest.approx(1 / 9)
    assert repeated_share([1] * 7) == 0


def test_tau_over_all_and_apart() -> None:
    (mine,) = judge(report(RUNS))
    assert mine["variant"] == "mine"
    assert mine["tau"] == pytest.approx(1 + 66 / 22)
    assert mine["tau_varied"] == pytest.approx(1 + 40 / 20)
    assert (mine["varied"], mine["prompts"]) == (2, 3)
    assert mine["repeated"] == pytest.approx(1.1 / 3)
    assert mine["by_type"]["code"]["tau"] == pytest.approx(3.0)
    assert mine["by_type"]["chat"]["tau"] == pytest.approx(14.0)
    assert mine["by_type"]["code"]["prompts"] == 2
    assert mine["speed_up"] == 2.0


def test_text_that_loops_everywhere_gives_no_tau_apart() -> None:
    (mine,) = judge(
        report([run("mine", 0, "code", cycles=1, accepted=3, verified=15, repeated=0.3)])
    )
    assert mine["tau_varied"] is None
    assert mine["varied"] == 0
    assert any("every text loops" in w for w in warnings_of([mine], "mine", None))


def test_a_good_drafter_is_not_warned_of() -> None:
    assert warnings_of(judge(report(RUNS)), "mine", "prompt-lookup") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"by_position": [0.29, 0.1]}, "only 29% of its first draft tokens"),
        ({"speed_up": 0.9}, "slower than alone"),
        ({"fell_back": "NaN"}, "given up on: NaN"),
        ({"mismatch": "they do not belong together", "by_position": [0.1]}, "not belong together"),
    ],
    ids=["few", "slow", "failed", "alarm"],
)
def test_what_is_suspicious_is_said(change: dict[str, Any], words: str) -> None:
    (mine,) = judge(report(RUNS))
    (warning,) = warnings_of([{**mine, **change}], "mine", None)
    assert words in warning


def test_much_less_than_the_checkpoint_states_is_said() -> None:
    entries = judge(report(RUNS))  # tau 4
    assert warnings_of(entries, "mine", None, 6.9) == []
    (warning,) = warnings_of(entries, "mine", None, 7.1)
    assert "states an acceptance length of 7.10; here it is 4.00" in warning


def test_prompt_lookup_that_does_better_is_said() -> None:
    other = [run("prompt-lookup", 0, "code", cycles=1, accepted=5, verified=8)]
    (warning,) = warnings_of(judge(report([*RUNS, *other])), "mine", "prompt-lookup")
    assert "prompt lookup" in warning
    assert warnings_of(judge(report(RUNS[:1])), "mine", None) == ["mine proposed nothing"]


def test_prompts_of_data_are_cut_at_the_response(tmp_path: Path) -> None:
    lines = [{"prompt_ids": [1, 2, 3], "response_ids": [4]}, {"tokens": [5, 6, 7, 8]}]
    lines += [{"tokens": [9, 1, 1, 2 + n]} for n in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = data_prompts([file], None, 10, limit=9, longest=2)
    assert {p.ids for p in found} == {(2, 3), (5, 6), (9, 1)}
    assert {p.suite for p in found} == {"mine"}
    assert len(data_prompts([file], None, 10, limit=1, longest=2)) == 1
    with pytest.raises(UsageError, match="cannot be read"):
        data_prompts([tmp_path / "nope"], None, 10, limit=1, longest=2)


def test_page_shows_warnings_and_types() -> None:
    data = report(RUNS)
    data |= {
        "target": "t", "date": "now", "simulated": None, "stages": [], "texts": [],
        "machine": {"device": "d", "backend": "cpu", "system": "s"}, "versions": {"mlx": "1"},
        "settings": {"lengths": [8], "repeats": 1, "warm_up": 1, "cool_down": 0.0,
                     "stop_at_eos": True},
        "drafters": judge(data), "warnings": ["odd <thing>"],
    }  # fmt: skip
    for variant in data["variants"]:
        variant["parts"] = {}
    speed = {"median": 1.0, "low": 1.0, "high": 1.0}
    for entry in data["summary"]:
        entry |= {"length": 8, "decode": speed, "prefill": speed, "peak_bytes": 1, "tau": 2.0,
                  "by_window": [], "efficiency": None}  # fmt: skip
    page = judgement_html(data)
    assert "draftloom eval: t" in page
    assert "odd &lt;thing&gt;" in page
    assert "Tau by content type" in page
    assert "<td>chat</td>" in page
    assert "<script" not in page
