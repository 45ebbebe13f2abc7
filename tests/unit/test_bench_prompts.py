"""Suites and data sets of the benchmark."""

import json
from pathlib import Path

import pytest

from draftloom.apps.bench.prompts import built_in_suites, load_dataset, load_suite
from draftloom.errors import UnknownNameError, UsageError

RECORDS = {
    "gsm8k": {"question": "Two and two?", "answer": "#### 4"},
    "math500": {"problem": "Solve x = 1.", "solution": "1", "answer": "1", "level": 1},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": ""},
    "mbpp": {"task_id": 1, "text": "Write f.", "code": "", "test_list": []},
    "mt-bench": {"question_id": 81, "category": "writing", "turns": ["First.", "Second."]},
}
TEXTS = {
    "gsm8k": "Two and two?",
    "math500": "Solve x = 1.",
    "humaneval": "def f():\n",
    "mbpp": "Write f.",
    "mt-bench": "First.",
}


def written(folder: Path, *lines: object) -> Path:
    file = folder / "data.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return file


def test_every_suite_has_at_least_eight_prompts() -> None:
    assert set(built_in_suites()) == {"code", "math", "chat", "edit"}
    for name in built_in_suites():
        prompts = load_suite(name)
        assert len({prompt.text for prompt in prompts}) >= 8
        assert all(prompt.text.strip() and prompt.suite == name for prompt in prompts)


def test_a_suite_can_be_cut() -> None:
    assert load_suite("math", 3) == load_suite("math")[:3]


def test_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'code'"):
        load_suite("coed")


@pytest.mark.parametrize("kind", RECORDS)
def test_formats_are_told_from_their_keys(kind: str, tmp_path: Path) -> None:
    (prompt,) = load_dataset(written(tmp_path, RECORDS[kind]))
    assert (prompt.suite, prompt.text) == (f"{kind}:data", TEXTS[kind])


def test_sanitized_mbpp_keeps_its_text_in_prompt(tmp_path: Path) -> None:
    record = {"prompt": "Write g.", "code": "", "test_list": [], "task_id": 2}
    (prompt,) = load_dataset(written(tmp_path, record))
    assert prompt.text == "Write g."


def test_limit_and_blank_lines(tmp_path: Path) -> None:
    file = written(tmp_path, "", RECORDS["gsm8k"], "", RECORDS["mbpp"], "not read any more")
    assert len(load_dataset(file, 2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input": "?"}, "line 1: unknown format .keys: input."),
        ("nonsense", "line 1: not JSON"),
        ([1], "line 1: not a JSON object"),
        ({"turns": []}, "line 1: looks like mt-bench, but its prompt is no text"),
        ({"question": 3, "answer": "4"}, "line 1: looks like gsm8k"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(written(tmp_path, line))


def test_no_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_dataset(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="holds no line"):
        load_dataset(written(tmp_path, ""))
