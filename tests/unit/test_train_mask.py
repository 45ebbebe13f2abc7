"""The block mask, and the weights of slots."""

import mlx.core as mx
import pytest

from draftloom.apps.train.mask import block_mask
from draftloom.apps.train.settings import TrainSettings, default_gamma
from draftloom.apps.train.step import slot_weights


def seen_by_hand(
    anchors: list[int], context: int, block: int, causal: bool, window: int | None
) -> list[list[list[bool]]]:
    """Block by block, query by query and key by key: the context, then the block itself."""
    blocks = []
    for anchor in anchors:
        queries = []
        for slot in range(block):
            row = []
            for key in range(context):
                near = window is None or anchor + slot - key < window
                row.append(key < anchor and near)
            queries.append(row + [not causal or key <= slot for key in range(block)])
        blocks.append(queries)
    return blocks


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [None, 1, 3, 100], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("block", [2, 5])
def test_mask_equals_a_loop_over_blocks(causal: bool, window: int | None, block: int) -> None:
    anchors = [[1, 4, 8], [2, 3, 10]]
    mask = block_mask(mx.array(anchors), 11, block, causal=causal, window=window)
    assert mask.shape == (2, 3, block, 11 + block)
    assert mask.tolist() == [seen_by_hand(row, 11, block, causal, window) for row in anchors]


def test_weights_decay_from_one() -> None:
    valid = mx.array([[[1.0, 1.0, 0.0]]])
    weights = slot_weights(valid, valid, TrainSettings(gamma=2.0), 4)
    assert weights.tolist()[0][0] == pytest.approx([1.0, 0.6065307, 0.0])


def test_gamma_of_the_paper() -> None:
    assert [default_gamma(size) for size in (16, 10, 8)] == [7.0, 5.0, 4.0]


def test_d_pace_weights_by_hand() -> None:
    probs = [0.2, 0.6, 1.0]
    settings = TrainSettings(weighting="d-pace", alpha=0.5)
    weights = slot_weights(mx.array([[probs]]), mx.ones((1, 1, 3)), settings, 4)
    kept = [0.5 * p + 0.5 for p in probs]
    reached = [kept[0], kept[0] * kept[1], kept[0] * kept[1] * kept[2]]
    by_hand = [sum(reached[k:]) for k in range(3)]
    assert weights.tolist()[0][0] == pytest.approx(by_hand)


def test_d_pace_weights_have_no_gradient() -> None:
    settings = TrainSettings(weighting="d-pace")

    def total(probs: mx.array) -> mx.array:
        return slot_weights(probs, mx.ones((1, 1, 3)), settings, 4).sum()

    assert mx.grad(total)(mx.array([[[0.2, 0.6, 1.0]]])).tolist() == [[[0.0, 0.0, 0.0]]]
