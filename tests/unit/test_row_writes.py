"""Rows written where only the device knows: the same rows, and no more launches than buffers."""

from __future__ import annotations

import io

import mlx.core as mx
import pytest

from draftloom import row_writes
from draftloom.row_writes import LEAST_ROWS, MOST_ROWS, traced_rows, write_rows


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(("offset", "rows"), [(0, 1), (5, 3), (12, 4)])
def test_rows_are_where_the_offset_says(
    cuda: bool, offset: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_writes, "on_cuda", lambda: cuda)
    buffer = mx.random.normal((2, 3, 16, 8), key=mx.random.key(1))
    new = mx.random.normal((2, 3, rows, 8), key=mx.random.key(2))
    found = write_rows(buffer, new, mx.array(offset))
    expected = mx.concatenate(
        [buffer[..., :offset, :], new, buffer[..., offset + rows :, :]], axis=2
    )
    assert mx.array_equal(found, expected)


def test_all_buffers_of_a_pass_share_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arange and each addition would be a launch of its own, for every layer."""
    monkeypatch.setattr(row_writes, "on_cuda", lambda: True)

    def write(buffers: list[mx.array], new: mx.array, offset: mx.array) -> list[mx.array]:
        return [write_rows(buffer, new, offset) for buffer in buffers]

    buffers = [mx.zeros((1, 2, 32, 4)) for _ in range(6)]
    given = mx.compile(write)(buffers, mx.ones((1, 2, 3, 4)), mx.array(7))
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *given)
    nodes = drawing.getvalue()
    assert nodes.count('label ="ScatterAxis"') == 6
    assert nodes.count("Arange") == 0
    assert nodes.count("Add") == 1
    assert all(buffer[0, 0, 7:10].sum() == 12 for buffer in given)


def test_lengths_begin_large_and_grow_by_what_they_are() -> None:
    assert traced_rows(0, 1) == LEAST_ROWS
    assert traced_rows(LEAST_ROWS, LEAST_ROWS) == LEAST_ROWS
    assert traced_rows(LEAST_ROWS, LEAST_ROWS + 1) == 2 * LEAST_ROWS
    assert traced_rows(2 * MOST_ROWS, 2 * MOST_ROWS + 1) == 3 * MOST_ROWS
    assert traced_rows(300, 301, step=256) == LEAST_ROWS
