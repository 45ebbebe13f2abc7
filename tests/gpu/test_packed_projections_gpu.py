"""One product for several projections on the GPU that is here: parity, memory, and the timing."""

import gc
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from draftloom import KernelSettings
from draftloom.adapters.packed import OPERATION, PackedModel
from draftloom.kernels.packed_projections import OneProduct, checks, plan

pytestmark = pytest.mark.gpu

SIZES, WIDTH = (4096, 1024, 1024), 2560


@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("kind", checks.SIZES)
def test_parity(kind, form):
    """The checks of the self-test."""
    check = next(check for check in checks.checks_of({kind}) if f" {form} " in check.name)
    outcome = check.run()
    assert outcome.passed, (check.name, outcome)


def layers(bits):
    """q, k and v of a real size."""
    made = [nn.Linear(WIDTH, size, bias=False) for size in SIZES]
    for layer in made:
        layer.set_dtype(mx.bfloat16)
    if bits:
        made = [layer.to_quantized(group_size=64, bits=bits) for layer in made]
    mx.eval([layer.parameters() for layer in made])
    return made


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_memory_does_not_double_and_slices_still_work(bits):
    """The layers alone give what they gave, from slices and after release."""
    made = layers(bits)
    whole = sum(a.nbytes for layer in made for _, a in tree_flatten(layer.parameters()))
    inputs = [mx.random.normal((1, tokens, WIDTH)).astype(mx.bfloat16) for tokens in (1, 16)]
    expected = [[layer(x) for layer in made] for x in inputs]
    mx.eval(expected)
    gc.collect()
    before = mx.get_active_memory()
    product = OneProduct(made)
    product.adopt()
    assert abs(mx.get_active_memory() - before) < 0.02 * whole
    for released in (False, True):
        if released:
            product.release()
        for x, wanted in zip(inputs, expected, strict=True):
            for found, old in zip([layer(x) for layer in made], wanted, strict=True):
                gap = mx.abs(found.astype(mx.float32) - old.astype(mx.float32)).max()
                assert gap.item() < 0.02 * mx.abs(old).max().item()


def test_the_timing_takes_about_a_second_and_names_every_kind(capsys):
    """And prints what it found, for the record."""
    groups = {
        "attention": [layers(None) for _ in range(4)],
        "mlp": [[nn.Linear(WIDTH, 9216, bias=False) for _ in range(2)] for _ in range(4)],
    }
    mx.eval([layer.parameters() for places in groups.values() for ls in places for layer in ls])
    found = plan.PLANS[OPERATION]["measure"].choose(groups)
    assert all(kind in found.reason for kind in groups)
    with capsys.disabled():
        print(json.dumps({"packs": sorted(found.kinds), "why": found.reason}))


def test_a_model_with_one_product_stays_near():
    """Tiny hybrid in float32: logits of a block, packed and apart."""
    from mlx_lm.models.cache import make_prompt_cache

    from tests.support import models

    model = models.build("qwen3_5")

    def logits():
        cache = make_prompt_cache(model)
        first = model(mx.array([[3, 1, 4, 1, 5]]), cache=cache)
        return mx.concatenate([first, model(mx.array([[9, 2, 6]]), cache=cache)], axis=1)

    apart, packed = logits(), PackedModel(model)
    mx.eval(apart)
    packed.tune(KernelSettings.of({OPERATION: "packed"}))
    found = logits()
    packed.restore()
    assert mx.abs(found - apart).max().item() < 0.02 * mx.abs(apart).max().item()
