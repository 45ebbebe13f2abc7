"""Every kernel and packing that runs here, by name and off, alone and all together: the same text.

On the CPU in float32, bit for bit, caches included, but for those that add in another order; their
text is the same too, unless two logits lie as near as their tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from draftloom.kernel_settings import OFF, implementations
from draftloom.kernels import ssm
from tests.support import cases, models, pipelines
from tests.support.cases import Case
from tests.support.families_more import RECURRENT, new_model

FAMILIES = ("qwen3_5", "qwen3")
OTHER_ORDER = {"gated-delta=chunked", "ssm=block", "ssm=off"}
"""What is not bit-equal to plain mlx-lm on the CPU."""


def choices() -> list[str]:
    """``operation=choice`` of everything that this device can run."""
    known = implementations(pipelines.plugins())
    here = [f"{one.operation}={one.name}" for one in known if one.why_not_here is None]
    return sorted({*here, *(f"{one.operation}={OFF}" for one in known)})


def pair(choice: str) -> tuple[str, str]:
    operation, _, name = choice.partition("=")
    return operation, name


def case(family: str, *kernels: str, drafter: str = "scripted-mixed") -> Case:
    prompt = tuple(i * 7 % models.VOCAB for i in range(1, 9))
    return Case(family, drafter, "auto", "block", 7, prompt, 3, kernels=tuple(map(pair, kernels)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", choices())
def test_each(choice: str, family: str, tmp_path: Path) -> None:
    if choice not in OTHER_ORDER:
        assert cases.run(case(family, choice), tmp_path) > 2
        return
    one = case(family, choice)
    with cases.build(one, tmp_path).build() as pipeline:
        tokens = pipeline.generate(one.prompt, max_tokens=cases.NEW_TOKENS).token_ids
    assert tokens == one.trace.tokens[len(one.prompt) :][: cases.NEW_TOKENS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafter", ["dflash", "prompt-lookup"])
def test_all_off(drafter: str, family: str, tmp_path: Path) -> None:
    off = sorted({f"{pair(choice)[0]}={OFF}" for choice in choices()} - OTHER_ORDER)
    assert cases.run(case(family, *off, drafter=drafter), tmp_path) > 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafter", ["dflash", "prompt-lookup"])
def test_all_on(drafter: str, family: str, tmp_path: Path) -> None:
    """The last registered implementation of every operation."""
    on = {pair(c)[0]: c for c in choices() if pair(c)[1] != OFF and c not in OTHER_ORDER}
    assert cases.run(case(family, *on.values(), drafter=drafter), tmp_path) > 2


@pytest.mark.parametrize("choice", ["auto", "stepwise", "block", "off"])
def test_mamba_in_either_order(choice: str) -> None:
    model = new_model(RECURRENT["mamba2"])
    prompt = (1, 5, 9, 2, 7, 5, 9, 2)
    steps = generate_step(mx.array(prompt), model, max_tokens=16)
    plain = tuple(int(token) for token, _ in steps)
    builder = pipelines.builder(model).drafter("test.scripted", **script((*prompt, *plain)))
    with builder.width(4).kernels({"ssm": choice}).build() as pipeline:
        orders = {layer.mixer._order for layer in pipeline.model.layers}
        result = pipeline.generate(prompt, max_tokens=16)
    assert orders == {ssm.stepwise if choice in ("auto", "stepwise") else ssm.block}
    assert result.token_ids == plain
    assert result.stats.accepted > 0
    assert result.stats.verified > result.stats.accepted  # the state went back


def script(text: tuple[int, ...]) -> dict[str, Any]:
    """Options of a drafter that is right now and then."""
    return {
        "text": text * 2,  # goes on past the end
        "vocab_size": models.VOCAB,
        "mode": "mixed",
        "seed": 3,
        "taps": (),
    }
