"""How many keys are valid, as the verify attention kernel is told."""

import mlx.core as mx
import pytest

from draftloom.kernels.verify_attention import valid_lengths


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize(
    "given", [7, mx.array(7, dtype=mx.int32)], ids=["number", "array without axes"]
)
def test_one_number_is_that_of_every_row(given: int | mx.array, rows: int) -> None:
    found = valid_lengths(given, rows)
    assert found.dtype == mx.int32
    assert found.tolist() == [7] * max(rows, 4), "at least 16 bytes"


def test_a_traced_pass_has_an_offset_without_axes() -> None:
    def run(offset: mx.array) -> mx.array:
        return valid_lengths(offset[:1].squeeze(0) + 2, 1)

    assert mx.compile(run)(mx.array([5, 5, 5, 5], dtype=mx.int32)).tolist() == [7] * 4
