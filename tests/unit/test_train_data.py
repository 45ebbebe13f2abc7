"""Training data: reading, checking, splitting, packing, and the labels of blocks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom.apps.train.batches import Batches
from draftloom.apps.train.data import Document, Packed, pack, read_corpus
from draftloom.apps.train.document import repr_digest
from draftloom.apps.train.settings import TrainSettings
from draftloom.errors import UsageError

WORDS = ["<eos>", "a", "b", "c", "d", "user", "assistant"]


class Words:
    """A tokenizer of single words with a chat template: ROLE WORDS <eos> for every message."""

    eos_token_id = 0
    has_chat_template = True

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False
    ) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids += [WORDS.index(message["role"]), *self.encode(message["content"]), 0]
        return [*ids, WORDS.index("assistant")] if add_generation_prompt else ids


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def read(*files: Path, tokenizer: Any = None, held_out: float = 0.0, seed: int = 0) -> Any:
    given = Words() if tokenizer is None else tokenizer
    return read_corpus(files, given, len(WORDS), held_out=held_out, seed=seed)


def test_text_is_trained_on_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b c")
    (document,) = read(tmp_path / "x.txt").train
    assert document.tokens == (1, 2, 3)
    assert document.trained == (True,) * 3
    assert document.prompt == 0


def test_response_is_trained_on_and_its_prompt_is_not(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "a b", "response": "c d"})
    (document,) = read(file).train
    assert document.tokens == (1, 2, 3, 4, 0)
    assert document.trained == (False, False, True, True, True)
    assert document.prompt == 2


def test_response_of_token_ids_is_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt_ids": [1, 2], "response_ids": [3, 4]})
    (document,) = read(file, tokenizer=False).train
    assert document.tokens == (1, 2, 3, 4)
    assert document.trained == (False, False, True, True)
    assert document.prompt == 2


def test_every_answer_of_a_chat_is_trained_on(tmp_path: Path) -> None:
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, "abcd", strict=True)]
    (document,) = read(write(tmp_path / "x.jsonl", {"messages": messages})).train
    assert document.tokens == (5, 1, 0, 6, 2, 0, 5, 3, 0, 6, 4, 0)
    assert [i for i, t in enumerate(document.trained) if t] == [4, 5, 10, 11]
    assert document.prompt == 10


def test_template_that_rewrites_old_turns_trains_the_last_one(tmp_path: Path) -> None:
    class Forgetful(Words):
        def apply_chat_template(
            self, messages: list[dict[str, str]], add_generation_prompt: bool = False
        ) -> list[int]:
            ids = super().apply_chat_template(messages, add_generation_prompt)
            return [*ids, 4] if add_generation_prompt else ids  # an empty thought

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write(tmp_path / "x.jsonl", {"messages": messages})
    (document,) = read(file, tokenizer=Forgetful()).train
    assert document.tokens == (5, 1, 0, 6, 4, 2, 0)
    assert document.trained == (False,) * 5 + (True, True)


def test_folder_is_read_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.py").write_text("a b c")
    (tmp_path / "y.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "z").write_text("a")
    assert [d.tokens for d in read(tmp_path).train] == [(1, 2, 3)]


def test_equal_documents_are_one(tmp_path: Path) -> None:
    corpus = read(write(tmp_path / "x.jsonl", {"text": "a b"}, {"text": "a b"}, {"text": "c"}))
    assert len(corpus.train) == 2
    assert corpus.duplicates == 1


def test_split_is_by_document_and_repeats(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", *({"tokens": [1, i % 7, i // 7, 2]} for i in range(40)))
    first, again = (read(file, held_out=0.2) for _ in range(2))
    assert first == again
    assert len(first.held_out) == 8
    assert not set(first.held_out) & set(first.train)
    assert read(file, held_out=0.2, seed=1).held_out != first.held_out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "no object"),
        ('{"tokens": [1, 99]}', "token id 99 is outside the target's vocabulary of 7"),
        ('{"tokens": [1, -1]}', "token id -1"),
        ('{"tokens": ["a"]}', "whole numbers"),
        ('{"tokens": [1], "prompt_tokens": 5}', "prompt_tokens"),
        ('{"tokens": 5}', "cannot be used"),
        ('{"tokens": [1, 99999999999999999999]}', "token id 99999999999999999999 is outside"),
        ('{"tokens": [1,, 2]}', "no JSON"),
        ('{"tokens": [1, 02]}', "no JSON"),
        ('{"tokens": [1 2]}', "no JSON"),
        ('{"tokens": [1, 2 3,4]}', "no JSON"),
        ('{"tokens": [1, 2,]}', "no JSON"),
        ('{"tokens": [1.0, 2]}', "whole numbers"),
        ('{"prompt_ids": [1], "response_ids": [2, 99]}', "token id 99 is outside"),
        ('{"prompt_ids": [1], "response_ids": [true]}', "whole numbers"),
        ('{"prompt_ids": [1]}', "cannot be used"),
        ('{"prompt": "a"}', "without a"),
        ('{"text": 5}', "a text is needed"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        ('{"messages": [{"content": "a"}]}', "cannot be used"),
    ],
)
def test_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"tokens": [1, 2]}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"x\.jsonl, line 2") as caught:
        read(tmp_path / "x.jsonl")
    assert words in str(caught.value)


@pytest.mark.parametrize("between", [",", ", ", " , ", ",\t"])
@pytest.mark.parametrize("ids", [[], [0], [3, 0, 6], [0, 0, 1]], ids=str)
def test_lines_are_read_as_json_however_they_are_written(
    tmp_path: Path, ids: list[int], between: str
) -> None:
    written = f"[{between.join(map(str, ids))}]"
    (tmp_path / "x.jsonl").write_text(
        f'{{"prompt_ids": {written}, "response_ids": [1{between}2]}}\n\n'
        f'{{"tokens":{written}}}\r\n {{ "tokens": [4{between}5], "prompt_tokens": 1 }}'
    )
    found = [(d.tokens, d.prompt) for d in read(tmp_path / "x.jsonl", tokenizer=False).train]
    assert found == [((*ids, 1, 2), len(ids)), (tuple(ids), 0), ((4, 5), 1)]


def test_fingerprint_is_that_of_earlier_versions(tmp_path: Path) -> None:
    lines = [{"prompt_ids": [1, 2], "response_ids": [3, 4]}, {"tokens": [5, 6, 1]}]
    corpus = read(write(tmp_path / "x.jsonl", *lines))
    assert corpus.train[0].digest.startswith("03aa474e44a70e9f")
    assert corpus.fingerprint.startswith("be9ba1344ec76eba")
    packed = pack(corpus.train, 3, 0)
    text = repr([p.tokens for p in packed])
    assert repr_digest(packed) == hashlib.sha256(text.encode()).hexdigest()


def save_rows(path: Path, **changes: Any) -> Path:
    arrays = {
        "tokens": mx.array([[1, 2, 3, 4], [5, 6, 0, 0]], dtype=mx.uint16),
        "lengths": mx.array([4, 2]),
        "prompts": mx.array([2, 0]),
        **changes,
    }
    mx.save_safetensors(str(path), {k: v for k, v in arrays.items() if v is not None})
    return path


def test_rows_of_a_tensor_file_are_documents(tmp_path: Path) -> None:
    file = save_rows(tmp_path / "x.safetensors")
    lines = [{"tokens": [1, 2, 3, 4], "prompt_tokens": 2}, {"tokens": [5, 6]}]
    rows, same = read(file), read(write(tmp_path / "x.jsonl", *lines))
    assert [d.tokens for d in rows.train] == [(1, 2, 3, 4), (5, 6)]
    assert [d.trained for d in rows.train] == [(False, False, True, True), (True, True)]
    assert rows.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": None}, "holds no 'lengths'"),
        ({"tokens": mx.ones((2, 4))}, "whole numbers"),
        ({"tokens": mx.array([[True], [True]])}, "whole numbers"),
        ({"tokens": mx.array([1, 2])}, r"tokens \[2\], lengths \[2\].* do not go together"),
        ({"lengths": mx.array([4, 5])}, "row 1: lengths is no number from 0 to 4"),
        ({"prompts": mx.array([5, 0])}, "row 0: prompts is no number from 0 to 4"),
        ({"prompts": mx.array([-1, 0])}, "row 0: prompts is no number from 0 to 4"),
        ({"tokens": mx.array([[1, 2, 3, 4], [5, 77, 0, 0]])}, "row 1: token id 77 is outside"),
    ],
)
def test_tensor_file_that_cannot_be_used_is_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        read(save_rows(tmp_path / "x.safetensors", **change))
    (tmp_path / "y.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"y\.safetensors cannot be read"):
        read(tmp_path / "y.safetensors")


def test_empty_data_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no document"):
        read(tmp_path / "x.txt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nope\.txt cannot be read"):
        read(tmp_path / "nope.txt")


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a b")
    with pytest.raises(UsageError, match="cannot be split"):
        read(tmp_path / "x.txt", held_out=0.1)


def document(*tokens: int, prompt: int = 0) -> Document:
    return Document(tokens, tuple(i >= prompt for i in range(len(tokens))), prompt, "here")


def test_texts_are_packed_and_chats_are_not() -> None:
    texts = [document(1, 2, 3), document(4, 5), document(6, 7, 8, 9, prompt=1)]
    packed = pack(texts, 4, 0)
    assert [p.tokens for p in packed] == [(6, 7, 8, 9), (1, 2, 3, 0), (4, 5, 0)]
    assert packed[1].segments == (0, 0, 0, 0)


ROWS = {
    "two-documents": (pack([document(1, 2, 3), document(4, 5, 6)], 8, 0)[0], [1, 2, 4, 5, 6]),
    "response": (Packed((1, 2, 3, 4, 5), (False, True, True, False, True), (0,) * 5), [1]),
    "all": (Packed((1, 2, 3, 4), (True,) * 4, (0,) * 4), [1, 2]),
    "two-of-one": (Packed((1, 2, 3, 4, 5, 6), (True,) * 6, (0, 0, 0, 1, 1, 1)), [1, 3, 4]),
}


def learned_by_hand(row: Packed, anchor: int, slots: int) -> tuple[list[int], list[float]]:
    """Labels after an anchor, and which of them count, slot by slot."""
    labels, valid, good = [], [], True
    for p in range(anchor + 1, anchor + 1 + slots):
        inside = p < len(row.tokens)
        good = good and inside and row.trained[p] and row.segments[p] == row.segments[anchor]
        labels.append(row.tokens[p] if inside else 0)
        valid.append(float(good))
    return labels, valid


@pytest.mark.parametrize("fixed_shapes", [False, True], ids=["", "fixed-shapes"])
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_blocks_and_labels_equal_a_loop_over_slots(slots: int, fixed_shapes: bool) -> None:
    rows = [row for row, _ in ROWS.values()]
    settings = TrainSettings(batch=4, anchors=9, compile=fixed_shapes)
    stream = Batches(rows, lambda n: (mx.zeros((len(n), 8, 4)), None), settings, slots=slots)
    batch, tokens = stream.batch(0)
    assert tokens == sum(len(row.tokens) for row in rows)
    found: Any = {name: getattr(batch, name).tolist() for name in
                  ("anchors", "anchor_tokens", "labels", "valid")}  # fmt: skip
    for place, number in enumerate(stream.numbers(0)):
        row, anchors = list(ROWS.values())[number]
        count = len(anchors)
        assert found["anchors"][place][:count] == anchors
        for block, anchor in enumerate(anchors):
            labels, valid = learned_by_hand(row, anchor, slots)
            assert found["anchor_tokens"][place][block] == row.tokens[anchor]
            assert found["labels"][place][block] == labels
            assert found["valid"][place][block] == valid
        assert not any(map(any, found["valid"][place][count:]))


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(UsageError, match="none of 1 documents"):
        pack([document(1, 2, 3, prompt=3)], 4, None)


def batches(seed: int = 0) -> Batches:
    rows = [Packed((i, *range(1, 20)), (True,) * 20, (0,) * 20) for i in range(5)]
    settings = TrainSettings(batch=2, anchors=3, seed=seed)
    return Batches(rows, lambda n: (mx.zeros((len(n), 20, 4)), None), settings, slots=3)


def chosen(stream: Batches, index: int) -> list[tuple[int, list[int]]]:
    """Sequence number and anchors of every row of a batch."""
    anchors: Any = stream.batch(index)[0].anchors.tolist()
    return list(zip(stream.numbers(index), anchors, strict=True))


def test_an_epoch_takes_every_sequence_once() -> None:
    stream = batches()
    numbers = [n for i in range(5) for n in stream.numbers(i)]
    assert sorted(numbers[:5]) == sorted(numbers[5:]) == list(range(5))


def test_anchors_are_drawn_anew_each_epoch_and_repeat_with_the_seed() -> None:
    drawn: dict[int, list[list[int]]] = {}
    for i in range(5):
        for number, anchors in chosen(batches(), i):
            assert anchors == sorted(set(anchors))
            assert anchors[0] >= 1
            assert anchors[-1] <= 18
            drawn.setdefault(number, []).append(anchors)
    assert all(first != second for first, second in drawn.values())
    assert chosen(batches(), 4) == chosen(batches(), 4)
    assert chosen(batches(1), 4) != chosen(batches(), 4)


def test_every_anchor_is_drawn_about_as_often() -> None:
    row = Packed(tuple(range(12)), (True,) * 12, (0,) * 12)
    settings = TrainSettings(batch=50, anchors=5)
    stream = Batches([row], lambda n: (mx.zeros((len(n), 12, 4)), None), settings, slots=3)
    drawn: Any = [p for i in range(20) for p in stream.batch(i)[0].anchors.reshape(-1).tolist()]  # type: ignore[union-attr]
    counts = [drawn.count(p) for p in range(12)]
    assert counts[0] == counts[11] == 0
    assert all(420 < count < 580 for count in counts[1:11])  # 500 each, deviation 16
