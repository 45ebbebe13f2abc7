"""What stands around the gated delta rule, in array code: against the reference, and bit-equal to
mlx-lm's own layers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache
from mlx_lm.models.gated_delta import compute_g, normalize_qk
from mlx_lm.models.qwen3_next import Qwen3NextRMSNormGated

from draftloom.adapters.gated_delta import RecordingMixer, project_qwen3_5
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.kernels import gated_delta_inputs, gated_norm
from draftloom.kernels.gated_delta_inputs import checks
from draftloom.kernels.gated_norm import checks as norm_checks

EVERY = [*checks.checks_of("array"), *norm_checks.checks_of("array")]


@pytest.mark.parametrize("check", EVERY, ids=lambda check: check.name)
def test_array_code_is_the_reference_within_the_rounding_of_its_type(check: checks.Check) -> None:
    outcome = check.run()
    assert outcome.passed, outcome


@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_array_code_is_mlx_lm_s_order_bit_for_bit(case: checks.Case) -> None:
    """Written out once more from mlx-lm's layer, with its own functions."""
    layer, (qkv, a, b), before, mask = case.arrays()
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    window = mx.concatenate([before, qkv], axis=1)
    mixed = layer.conv(window)
    mixed = mixed * mx.sigmoid(mixed)
    heads = (layer.key_heads, layer.key_heads, layer.value_heads)
    sizes = (layer.key_size, layer.key_size, layer.value_size)
    keys = layer.key_heads * layer.key_size
    q, k, v = (
        part.reshape(*part.shape[:2], count, size)
        for part, count, size in zip(
            mx.split(mixed, [keys, 2 * keys], -1), heads, sizes, strict=True
        )
    )
    q, k = normalize_qk(q, k, inv_scale=layer.key_size**-0.5, eps=1e-6)
    g = compute_g(layer.a_log, a, layer.dt_bias)
    found = gated_delta_inputs.prepare(*case.arrays())
    wanted = (q, k, v, g, mx.sigmoid(b), window)
    for name, mine, theirs in zip(found._fields, found, wanted, strict=True):
        assert mine.dtype == theirs.dtype, name
        assert mx.array_equal(mine, theirs), name


def test_the_stock_norm_is_a_plain_one_and_multiplies_with_silu() -> None:
    norm, y, z = norm_checks.Case(mx.float32, (2, 3, 2, 32)).arrays()
    assert isinstance(norm, Qwen3NextRMSNormGated)
    assert set(norm.parameters()) == {"weight"}
    assert norm.eps == 1e-6
    rows, gates, weight = (np.array(x, dtype=np.float64) for x in (y, z, norm.weight))
    wanted = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * weight
    wanted *= gates / (1 + np.exp(-gates))
    assert np.allclose(np.array(norm(y, z)), wanted, atol=1e-5)
    assert mx.array_equal(gated_norm.normalise(norm, y, z), norm(y, z))


@pytest.mark.parametrize("defer", [False, True], ids=["commit-replays", "deferred"])
def test_what_is_carried_between_tokens_is_float32_in_a_bfloat16_layer(defer: bool) -> None:
    """State, innovations and decays, through blocks and commits; keys are what verify used."""
    config = qwen3_5.TextModelArgs(
        hidden_size=16, linear_num_value_heads=2, linear_num_key_heads=1,
        linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    stock = qwen3_5.GatedDeltaNet(config)
    stock.set_dtype(mx.bfloat16)
    mixer, cache = RecordingMixer(stock, project_qwen3_5), ArraysCache(2)
    rollback = TapeReplayRollback(defer=defer)
    x = mx.random.normal((1, 12, 16)).astype(mx.bfloat16)
    for at in (0, 4, 8):
        speculation = rollback.begin(cache, mx.zeros((1, 4)))
        assert mixer(x[:, at : at + 4], None, speculation.entry).dtype == mx.bfloat16
        (tape,) = speculation.entry.tapes
        assert (tape.delta.dtype, tape.g.dtype, tape.k.dtype) == (
            mx.float32, mx.float32, mx.bfloat16,
        )  # fmt: skip
        speculation.commit((1,))
        window, state = cache.cache
        assert (window.dtype, state.dtype) == (mx.bfloat16, mx.float32)
