"""Traced passes and drafts on the GPU that is here."""

from pathlib import Path

import mlx.core as mx
import pytest

from draftloom.adapters import compiled_pass
from draftloom.drafters.dflash import compiled
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
