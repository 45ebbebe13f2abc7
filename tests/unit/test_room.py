"""How many tokens a text, and a block at its end, may take."""

from __future__ import annotations

import pytest

from draftloom.room import UNKNOWN, Room


@pytest.mark.parametrize(
    ("written", "verify", "whole", "wanted"),
    [
        (0, 15, False, 100),  # far from the end: the width decides, not this
        (95, 15, False, 5),
        (95, 15, True, 15),  # a whole block, cut off behind the end
        (100, 15, True, 0),
        (101, 15, True, -1),
        (80, 15, True, 20),
    ],
)
def test_drafts_behind_what_is_written(written: int, verify: int, whole: bool, wanted: int) -> None:
    assert Room(100, UNKNOWN, whole).for_drafts(written, verify) == wanted


def test_a_whole_block_ends_where_the_context_does() -> None:
    room = Room(100, 103, whole=True)
    assert room.for_drafts(95, 15) == 8
    assert Room(100, 100, whole=True).for_drafts(95, 15) == 5
    assert Room(100, UNKNOWN, whole=True).for_drafts(70_000, 15) < 0
