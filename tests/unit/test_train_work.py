"""Operations of a step, counted by hand."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.apps.train.design import DrafterDesign, design_drafter, read_config
from draftloom.apps.train.step import BlockBatch
from draftloom.apps.train.work import drafter_operations, target_operations
from draftloom.contracts import TargetInfo
from draftloom.model_info import ModelInfo

HIDDEN, INNER, HEADS, KV, SIZE, VOCAB = 32, 48, 4, 2, 8, 100
ROWS, CONTEXT, BLOCKS, SLOTS = 2, 20, 3, 4


def test_operations_of_the_drafter() -> None:
    model = ModelInfo("t", None, {
        "model_type": "qwen3", "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": SIZE, "intermediate_size": INNER,
    })  # fmt: skip
    info = TargetInfo(
        name="t", adapter="a", model_type="qwen3", hidden_size=HIDDEN, vocab_size=VOCAB,
        num_layers=6, cache_kinds=(),
    )  # fmt: skip
    design = DrafterDesign(layers=1, taps=(1, 3), block_size=SLOTS + 1)
    config = read_config(design_drafter(model, info, None, design), "d")
    labels = mx.zeros((ROWS, BLOCKS, SLOTS), dtype=mx.int32)
    batch = BlockBatch(
        features=mx.zeros((ROWS, CONTEXT, 2 * HIDDEN)), anchors=labels[..., 0],
        anchor_tokens=labels[..., 0], labels=labels, valid=labels,
    )  # fmt: skip
    tokens = SLOTS + 1
    of_token = {
        "q and o": 2 * HIDDEN * HEADS * SIZE,
        "k and v": 2 * HIDDEN * KV * SIZE,
        "mlp": 3 * HIDDEN * INNER,
        "scores and values": 2 * HEADS * SIZE * (CONTEXT + tokens),
    }
    forward_and_both_gradients = 3 * (
        BLOCKS * tokens * sum(of_token.values()) + CONTEXT * of_token["k and v"]
    )
    fc = 2 * CONTEXT * 2 * HIDDEN * HIDDEN  # forward, and the gradient of its weights
    head = 2 * BLOCKS * SLOTS * HIDDEN * VOCAB  # forward, and the gradient of its input
    expected = 2 * ROWS * (forward_and_both_gradients + fc + head)
    assert drafter_operations(config, batch) == expected


def test_operations_of_the_target_end_at_the_last_tap() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(64, 8)
            self.packed = nn.QuantizedLinear(64, 16, bits=4)

    class Target:
        class model:
            class model:
                layers = (Part(), Part(), Part())

    target: Any = Target
    assert target_operations(target, (0, 1), 5) == 2 * 5 * 2 * (64 * 8 + 64 * 16)
