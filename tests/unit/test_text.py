"""From tokens to text: nothing is taken back, no half characters, stop strings wherever cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom import UsageError
from draftloom.text import TextStream

from .fakes import OneTokenEach, quick, tokenizer

REPLACEMENT = "\ufffd"
PIECES = [
    "a",
    " b",
    "\n",
    "  ",
    "\t",
    "é",
    "e\u0301",
    "日本",
    "語",
    "👍",
    "👩‍👩‍👧",
    "🇩🇪",
    "\u0915\u093f",
]
# mlx-lm's own detokenizer turns a NUL byte into another character.
characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(
    characters, max_size=20
)


def byte_tokens(text: str) -> list[int]:
    """A text as one token a byte, which no encoder would choose."""
    vocabulary = tokenizer().get_vocab()
    units = [tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(c) for c in text]
    return [vocabulary[unit] for parts in units for word, _ in parts for unit in word]


def pushed(tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer(), stop)
    pieces = []
    for token in tokens:
        piece, stopped = stream.push(token)
        pieces.append(piece)
        assert stream.text == "".join(pieces)
        if stopped:
            return pieces, True
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces, False


def decoded(tokens: Sequence[int]) -> str:
    """The text of tokens. mlx-lm's detokenizer drops one space at the very beginning."""
    text = tokenizer().decode(tokens, clean_up_tokenization_spaces=False)
    return text.removeprefix(" ")


@quick
@given(texts)
def test_pieces_make_up_the_text(text: str) -> None:
    tokens = tokenizer().encode(text, add_special_tokens=False)
    pieces, _ = pushed(tokens)
    assert "".join(pieces) == decoded(tokens)


@quick
@given(texts.filter(lambda t: REPLACEMENT not in t))
def test_no_half_characters_when_every_byte_is_a_token(text: str) -> None:
    tokens = byte_tokens(text)
    pieces, _ = pushed(tokens)
    assert "".join(pieces) == text.removeprefix(" ")
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_byte_tokens_really_split_characters() -> None:
    assert len(byte_tokens("👍")) == 4
    assert tokenizer().decode(byte_tokens("👍日é")) == "👍日é"


@quick
@given(st.lists(st.integers(0, 8191).filter(lambda t: "\0" not in decoded([t])), max_size=12))
def test_any_tokens_give_what_decoding_them_at_once_gives(tokens: list[int]) -> None:
    pieces, _ = pushed(tokens)
    assert "".join(pieces) == decoded(tokens)


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    tokens = byte_tokens("ok日")[:-1]
    pieces, _ = pushed(tokens)
    assert pieces[:-1] == ["o", "k", "", ""]
    assert pieces[-1] == REPLACEMENT


# --- stop strings ----------------------------------------------------------------------------


@quick
@given(
    st.text("abc", max_size=14),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=14),
)
def test_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], lengths: list[int]
) -> None:
    """Over tokens of several characters: the stream sees the text in uneven pieces."""
    stream, got, position, stopped = TextStream(Words(text, lengths), stops), "", 0, False
    for count in [*lengths, len(text)]:
        if position >= len(text):
            break
        position = min(position + count, len(text))
        piece, stopped = stream.push(position)
        got += piece
        if stopped:
            break
        assert text.startswith(got)
    if not stopped:
        got += stream.finish()
    seen = text[:position]
    found = [seen.find(s) for s in stops if s in seen]
    assert stopped == bool(found)
    assert got == (seen[: min(found)] if found else text)
    assert stream.text == got


class Words:
    """A tokenizer whose token n reveals a text up to its n-th character."""

    def __init__(self, text: str, lengths: Sequence[int]) -> None:
        self._text, self._lengths, self._seen = text, lengths, 0
        self.last_segment = ""

    @property
    def detokenizer(self) -> "Words":
        return Words(self._text, self._lengths)

    def add_token(self, position: int) -> None:
        self.last_segment = self._text[self._seen : position]
        self._seen = position

    def finalize(self) -> None:
        self.last_segment = ""


def test_a_stop_string_across_tokens_is_never_shown() -> None:
    tokens = tokenizer().encode("return x\n\n\ndef f", add_special_tokens=False)
    pieces, stopped = pushed(tokens, ["\n\n\ndef"])
    assert stopped
    assert "".join(pieces) == "return x"


def test_a_stop_string_across_the_bytes_of_a_character() -> None:
    pieces, stopped = pushed(byte_tokens("ab👍c"), ["b👍"])
    assert stopped
    assert "".join(pieces) == "a"


def test_text_that_only_begins_a_stop_string_comes_in_the_end() -> None:
    stream = TextStream(OneTokenEach(), ["CDE"])
    assert [stream.push(t)[0] for t in (0, 2, 3)] == ["A", "", ""]
    assert stream.finish() == "CD"


def test_text_held_back_comes_when_the_stop_string_does_not() -> None:
    stream = TextStream(OneTokenEach(), ["ABC"])
    assert [stream.push(t)[0] for t in (0, 1, 0, 1, 3)] == ["", "", "AB", "", "ABD"]


def test_the_earliest_of_several_stop_strings_wins() -> None:
    tokens = tokenizer().encode("one two three", add_special_tokens=False)
    assert "".join(pushed(tokens, ["three", "tw", "zzz"])[0]) == "one "


@pytest.mark.parametrize("stop", [[""], ["ok", ""]])
def test_an_empty_stop_string_is_refused(stop: list[str]) -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        TextStream(tokenizer(), stop)
