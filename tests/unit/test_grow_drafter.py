"""`docs/training/python_pair/grow.py`: a deeper drafter that proposes what the drafter did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.support.dflash_numpy import DFlashReference
from tests.support.pipelines import dflash_checkpoint

GROW = Path(__file__).parents[2] / "docs" / "training" / "python_pair" / "grow.py"
HIDDEN, VOCAB = 32, 40


def grown(drafter: Path, out: Path, *options: str) -> Path:
    subprocess.run([sys.executable, GROW, drafter, out, *options], check=True, timeout=120)
    return out


def reference(folder: Path) -> DFlashReference:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights = mx.load(str(folder / "model.safetensors"))
    return DFlashReference(config, {name: np.array(value) for name, value in weights.items()})


def test_a_grown_drafter_proposes_the_same(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    drafter = dflash_checkpoint(
        tmp_path / "draft", hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=3,
        layer_types=kinds, sliding_window=5,
    )  # fmt: skip
    larger = grown(drafter, tmp_path / "larger", "--twice", "0,2", "--tap", "2,5")
    config = json.loads((larger / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [kinds[i] for i in (0, 0, 1, 2, 2)]
    assert config["dflash_config"]["target_layer_ids"] == [1, 2, 3, 4, 5]

    random = np.random.default_rng(0)
    block, taps = random.standard_normal((9, HIDDEN)), random.standard_normal((12, 5, HIDDEN))
    known = taps[:, [0, 2, 3]].reshape(12, -1)
    wanted = reference(drafter).hidden(block, known)
    found = reference(larger).hidden(block, taps.reshape(12, -1))
    assert np.abs(found - wanted).max() < 1e-12

    weights = mx.load(str(larger / "model.safetensors"))
    silent = [name for name, value in weights.items() if not value.any().item()]
    outputs = ("mlp.down_proj.weight", "self_attn.o_proj.weight")
    assert sorted(silent) == [f"layers.{copy}.{name}" for copy in (1, 4) for name in outputs]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    drafter = dflash_checkpoint(
        tmp_path / "draft", hidden=HIDDEN, vocab=VOCAB, taps=(1,),
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    with pytest.raises(subprocess.CalledProcessError):
        grown(drafter, drafter, "--twice", "0")
    assert reference(drafter).config["num_hidden_layers"] == 2
