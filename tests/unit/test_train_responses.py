"""Responses that the target writes: its own words, kept in whole shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from draftloom import PipelineBuilder
from draftloom.apps.train import responses as module
from draftloom.apps.train.data import Document, read_corpus
from draftloom.apps.train.responses import Responses, ResponseSettings, prompts_of
from draftloom.apps.train.target import FrozenTarget
from draftloom.apps.train.toy import make_toy
from draftloom.errors import DraftloomError, UsageError
from draftloom.plugins import PluginManager

PROMPTS = [(5, 6, 7), (8, 9), (10, 11, 12), (13, 14, 15), (16, 17), (18, 19, 20)]
GREEDY = ResponseSettings(tokens=6, batch=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrozenTarget]:
    toy = make_toy(tmp_path_factory.mktemp("toy"), steps=10)
    frozen = FrozenTarget(str(toy / "target"), PluginManager(entry_points=False))
    yield frozen
    frozen.close()


def records(files: list[Path]) -> dict[tuple[int, ...], list[int]]:
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {tuple(r["prompt_ids"]): r["response_ids"] for r in lines}


def written(folder: Path, target: FrozenTarget, settings: ResponseSettings = GREEDY) -> Any:
    return records(Responses(folder, target, "f", PROMPTS, settings).write())


def test_greedy_responses_are_those_of_the_target_alone(
    target: FrozenTarget, tmp_path: Path
) -> None:
    found = written(tmp_path, target)
    assert found.keys() == set(PROMPTS)
    with target.released() as model:
        builder = PipelineBuilder().model(model, target.tokenizer).drafter("none")
        with builder.build() as pipeline:
            for prompt, response in found.items():
                alone = pipeline.generate(prompt, max_tokens=6, temperature=0.0)
                assert response[: len(alone.token_ids)] == list(alone.token_ids)
                assert len(response) - len(alone.token_ids) in (0, 1)  # the end itself


def test_response_ends_with_the_end_of_sequence(
    target: FrozenTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tmp_path / "whole", target)
    end = whole[PROMPTS[0]][2]

    class Ends:
        eos_token_ids = (end,)

    monkeypatch.setattr(target, "tokenizer", Ends())
    cut = written(tmp_path / "cut", target)
    for prompt, response in whole.items():
        expected = response[: response.index(end) + 1] if end in response else response
        assert cut[prompt] == expected
    assert len(cut[PROMPTS[0]]) <= 3


def test_sampling_repeats_with_its_seed(target: FrozenTarget, tmp_path: Path) -> None:
    hot = attrs.evolve(GREEDY, temperature=1.5)
    first, again = (written(tmp_path / name, target, hot) for name in ("a", "b"))
    assert first == again
    assert written(tmp_path / "c", target, attrs.evolve(hot, seed=1)) != first
    assert written(tmp_path / "d", target) != first


def test_whole_shards_are_kept(
    target: FrozenTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 1)
    whole = written(tmp_path / "whole", target)
    made = Responses(tmp_path / "out", target, "f", PROMPTS, GREEDY)
    told: list[dict[str, Any]] = []

    def kill(record: dict[str, Any]) -> None:
        told.append(record)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.write(kill)
    kept = sorted(p.name for p in (tmp_path / "out").glob("*.jsonl"))
    assert kept == ["responses-00000.jsonl", "responses-00001.jsonl"]
    told.clear()
    files = Responses(tmp_path / "out", target, "f", PROMPTS, GREEDY).write(told.append)
    assert len(told) == 1  # the third batch alone
    assert told[-1]["done"] == told[-1]["total"] == 6
    assert told[-1]["seconds_left"] == 0
    assert records(files) == whole


def test_full_disk_is_told(
    target: FrozenTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(DraftloomError, match="No space left on device"):
        written(tmp_path / "out", target)
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 5}, {"temperature": 1.0}], ids=str)
def test_responses_made_otherwise_are_refused(
    target: FrozenTarget, tmp_path: Path, change: dict[str, Any]
) -> None:
    written(tmp_path, target)
    with pytest.raises(UsageError, match=f"made otherwise: .*{next(iter(change))}"):
        Responses(tmp_path, target, "f", PROMPTS, attrs.evolve(GREEDY, **change))
    with pytest.raises(UsageError, match="made otherwise: target"):
        Responses(tmp_path, target, "other", PROMPTS, GREEDY)


def test_the_folder_is_data(target: FrozenTarget, tmp_path: Path) -> None:
    found = written(tmp_path, target)
    corpus = read_corpus([tmp_path], None, target.info.vocab_size, held_out=0.0, seed=0)
    assert {d.tokens for d in corpus.train} == {(*p, *r) for p, r in found.items()}
    assert all(d.prompt in (2, 3) for d in corpus.train)


def document(*tokens: int, prompt: int = 0) -> Document:
    return Document(tokens, tuple(i >= prompt for i in range(len(tokens))), prompt, "here")


def test_prompts_of_lines_and_of_plain_text() -> None:
    settings = ResponseSettings(tokens=4, prompt_tokens=2)
    lines = [document(1, 2, 3, 9, prompt=3), document(1, 2, 3, 8, prompt=3)]
    assert prompts_of(lines, settings, 20) == [(1, 2, 3)]
    assert prompts_of(lines, settings, 6) == [(2, 3)]  # the end of one that is too long
    text = [document(*range(10, 24))]
    assert sorted(prompts_of(text, settings, 20)) == [(10, 11), (16, 17), (22, 23)]
    assert len(prompts_of(text, attrs.evolve(settings, limit=2), 20)) == 2
    assert prompts_of([document(7, 8)], settings, 20) == [(7,)]
    with pytest.raises(UsageError, match="no room for a prompt"):
        prompts_of(lines, settings, 4)


@pytest.mark.parametrize("change", [{"tokens": 0}, {"limit": 0}, {"temperature": -1.0}], ids=str)
def test_numbers_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        attrs.evolve(GREEDY, **change).check()
