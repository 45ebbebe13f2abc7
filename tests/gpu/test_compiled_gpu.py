"""Traced passes and drafts on the GPU that is here."""

from pathlib import Path

import mlx.core as mx
import pytest

from draftloom.adapters import compiled_pass
from draftloom.drafters.dflash import compiled
from tests.support import models, pipelines
from tests.support.drafts_ahead import CYCLES, disagreements

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("one", [compiled_pass.on, compiled.on, compiled.ahead])
def test_parity(one):
    """The checks of the self-test."""
    for check in one.checks():
        outcome = check.run()
        assert outcome.passed, (check.name, outcome)


@pytest.mark.parametrize("packed", ["off", "packed"])
def test_drafts_made_ahead_are_those_made_after(packed: str, tmp_path: Path) -> None:
    """More layers than an offset has entries: they are rows of one rotation."""
    wrong, made = disagreements(tmp_path, {"packed-drafter": packed}, {}, num_hidden_layers=6)
    assert len(wrong) <= 2, "ties apart, the drafts are the same"
    assert made == CYCLES - 1
    assert mx.default_device() == mx.Device(mx.gpu)


def test_passes_are_traced_with_all_that_is_on_by_default() -> None:
    """Heads of 256, so that verify attention's kernel takes part in the trace."""
    family = models.FAMILIES["qwen3_5"]
    model = models.new(family, head_dim=256, hidden_size=64)
    model.set_dtype(mx.bfloat16)
    with pipelines.builder(model).drafter("prompt-lookup").width(3).build() as pipeline:
        pipeline.generate([1, 2, 3, 4] * 3, max_tokens=24, ignore_eos=True)
        compiled = pipeline._parts.target.compiled  # type: ignore[attr-defined]
        assert compiled.why_not == ""
        assert compiled.replayed > 0
