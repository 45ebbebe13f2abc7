"""The drafter that is trained when nothing is said."""

from typing import Any

import pytest

from draftloom.apps.train.design import DrafterDesign, default_taps, design_drafter, mask_token
from draftloom.contracts import CacheKind, TargetInfo
from draftloom.errors import UsageError
from draftloom.model_info import ModelInfo


def info(**changes: Any) -> TargetInfo:
    facts = {
        "name": "t", "adapter": "a", "model_type": "qwen3", "hidden_size": 4096,
        "vocab_size": 151936, "num_layers": 36, "cache_kinds": (CacheKind.ATTENTION,),
        "context_limit": 40960,
    }  # fmt: skip
    return TargetInfo(**(facts | changes))  # type: ignore[arg-type]


def made(config: dict[str, Any], target: TargetInfo, **asked: Any) -> dict[str, Any]:
    return design_drafter(ModelInfo("t", None, config), target, None, DrafterDesign(**asked))


QWEN3_8B = {
    "model_type": "qwen3", "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
}  # fmt: skip
QWEN3_5_4B = {
    "model_type": "qwen3_5",
    "text_config": {
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
        "intermediate_size": 9216, "rope_parameters": {"rope_theta": 10000000},
    },
}  # fmt: skip


def test_taps_of_the_public_drafter_of_qwen3_8b() -> None:
    assert default_taps(36) == (1, 9, 17, 25, 33)


@pytest.mark.parametrize("layers", range(1, 100))
def test_taps_are_layers_in_order(layers: int) -> None:
    taps = default_taps(layers)
    assert list(taps) == sorted(set(taps))
    assert 0 <= taps[0] <= taps[-1] < layers


def test_drafter_of_qwen3_8b_has_the_public_shape() -> None:
    config = made(QWEN3_8B, info())
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in names] == [5, 32, 8, 128]
    assert config["intermediate_size"] == 12288
    assert config["block_size"] == 16
    assert config["rope_theta"] == 1000000


def test_wide_heads_are_split_into_heads_of_128() -> None:
    config = made(QWEN3_5_4B, info(hidden_size=2560, num_layers=32))
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in names] == [32, 8, 128]
    assert config["rope_theta"] == 10000000


def test_experts_give_no_width_to_the_drafter() -> None:
    config = made({**QWEN3_8B, "num_experts": 8}, info())
    assert config["intermediate_size"] == 3 * 4096


def test_sliding_window_leaves_the_last_layer_full() -> None:
    kinds = made(QWEN3_8B, info(), sliding_window=512)["layer_types"]
    assert kinds == ["sliding_attention"] * 4 + ["full_attention"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"taps": (1, 36)}, "not different layers"),
        ({"taps": (1, 1)}, "not different layers"),
        ({"block_size": 1}, "drafts nothing"),
        ({"mask_token": 151936}, "outside the vocabulary"),
        ({"heads": 3}, "cannot share"),
    ],
)
def test_what_does_not_fit_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(QWEN3_8B, info(), **asked)


class Tokenizer:
    def __init__(self, used: int, pad: int | None, eos: int | None) -> None:
        self._used, self.pad_token_id, self.eos_token_id = used, pad, eos

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._used)}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Tokenizer(90, 5, 6), 90),
        (Tokenizer(100, 5, 6), 5),
        (Tokenizer(100, None, 6), 6),
        (Tokenizer(100, None, None), 99),
        (None, 99),
    ],
    ids=["unused", "padding", "end", "last", "no-tokenizer"],
)
def test_mask_token(tokenizer: Any, expected: int) -> None:
    assert mask_token(100, tokenizer) == expected
