"""The mismatch alarm on the bundled pair: the weights that users try first."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.utils import dequantize_model

import draftloom
from draftloom import DrafterMismatchWarning
from draftloom.adapters.bundled import default_pair
from draftloom.apps.bench.prompts import load_suite
from draftloom.apps.prompts import AUDIT_PROMPTS, DEMO_PROMPT
from tests.support import models, pipelines

HARD = [load_suite("code", 8)[7].text, load_suite("chat", 6)[5].text]
"""On these the bundled drafter hits one first token in eight."""
TEXTS = tuple(p.text for p in load_suite("code"))
"""The target soon repeats itself, and what is repeated counts once: several beginnings."""


@pytest.fixture(scope="module")
def target() -> tuple[Any, Any]:
    """In float32: 8-bit products are slow on a CPU."""
    model, tokenizer = mlx_lm.load(str(default_pair().target))
    model = dequantize_model(model)
    model.apply(lambda w: w.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else w)
    return model, tokenizer


def random_checkpoint(folder: Path) -> str:
    """A DFlash drafter of the right shapes that was never trained."""
    pipelines.dflash_checkpoint(
        folder, hidden=384, vocab=8192, taps=(1, 3, 4, 5, 6), num_target_layers=8
    )
    return str(folder)


@pytest.mark.slow
def test_the_right_pair_never_makes_it_ring(target: tuple[Any, Any]) -> None:
    """One pipeline a prompt, so that no text lives on the credit of another."""
    for prompt in (*AUDIT_PROMPTS, DEMO_PROMPT, *HARD):
        builder = (
            draftloom.PipelineBuilder()
            .own_width()
            .model(*target)
            .drafter(str(default_pair().draft))
        )
        with warnings.catch_warnings(), builder.width(3).build() as pipeline:
            warnings.simplefilter("error", DrafterMismatchWarning)
            result = pipeline.generate(prompt, max_tokens=40, ignore_eos=True)
        assert result.stats.mismatch == ""


def texts(
    model: Any, tokenizer: Any, drafter: str, prompts: tuple[Any, ...], tokens: int
) -> list[str]:
    """What the statistics of each text say of the alarm, in one pipeline."""
    builder = draftloom.PipelineBuilder().own_width().model(model, tokenizer).drafter(drafter)
    with builder.width(3).build() as pipeline:
        results = [pipeline.generate(p, max_tokens=tokens, ignore_eos=True) for p in prompts]
    return [result.stats.mismatch for result in results]


@pytest.mark.slow
def test_an_untrained_drafter_makes_it_ring(target: tuple[Any, Any], tmp_path: Path) -> None:
    drafter = random_checkpoint(tmp_path / "untrained")
    with pytest.warns(DrafterMismatchWarning) as told:
        said = texts(*target, drafter, TEXTS, 20)
    assert len(told) == 1
    assert "0 of 53 first draft tokens" in said[-1]


@pytest.mark.slow
def test_another_target_s_drafter_makes_it_ring(target: tuple[Any, Any]) -> None:
    """The bundled drafter under a target of the same shapes and other weights."""
    other: nn.Module = type(target[0])(target[0].args)
    models.randomize(other, 3)
    drafter = str(default_pair().draft)
    with pytest.warns(DrafterMismatchWarning):
        said = texts(other, None, drafter, tuple((i + 5, 9, 2) for i in range(6)), 20)
    stated = json.loads((default_pair().draft / "config.json").read_text())["draftloom"]
    assert f"the checkpoint states {stated['acceptance_length']}" in said[-1]


@pytest.mark.slow
def test_the_command_line_says_it_once(cli: Any, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "stranger")
    done = cli(
        "generate", DEMO_PROMPT, "--drafter", folder, "--width", 2, "--max-tokens", 90,
        "--temperature", 1, "--seed", 4, "--json",
    )  # fmt: skip
    lines = [line for line in done.err.splitlines() if "belong together" in line]
    assert len(lines) == 1
    assert lines[0].startswith("draftloom: drafter 'dflash'")
    assert "drafting goes on" in lines[0]
    assert done.json["mismatch"] in lines[0]
    assert done.json["fell_back"] == ""
