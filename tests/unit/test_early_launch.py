"""Passes handed to the device in pieces: the same values, layers put back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from draftloom import PipelineBuilder
from draftloom.adapters.early_launch import eighths, every_layer

from .fakes import PROMPT, half_right, model, new_model, pipeline_of, plain


@pytest.mark.parametrize(
    ("part", "count", "expected"),
    [
        (eighths, 32, [3, 7, 11, 15, 19, 23, 27]),
        (eighths, 12, [0, 2, 3, 5, 6, 8, 9]),
        (eighths, 3, [0, 1]),
        (eighths, 1, []),
        (every_layer, 4, [0, 1, 2]),
        (every_layer, 1, []),
    ],
)
def test_places(part: Any, count: int, expected: list[int]) -> None:
    assert part.places(count) == expected


@pytest.mark.parametrize("choice", ["eighths", "every-layer"])
@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_the_same_text_from_passes_in_pieces(
    family: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = plain(model(family), PROMPT, 16)
    layers = list(model(family).model.layers if family == "attention" else _hybrid_layers())
    launched: list[int] = []
    passes: list[Any] = []
    launch = mx.async_eval

    def watched(*arrays: Any) -> None:
        launched.extend(a.ndim for a in arrays if isinstance(a, mx.array))
        launch(*arrays)

    def configure(builder: PipelineBuilder) -> PipelineBuilder:
        return builder.kernels({"early-launch": choice})

    drafter = half_right(text, 2)
    with pipeline_of(drafter, target=model(family), configure=configure) as pipeline:
        assert f"early-launch {choice}" in " ".join(pipeline.describe().split())
        adapter: Any = pipeline._parts.target
        forward = adapter.forward
        adapter.forward = lambda *given: (passes.append(given), forward(*given))[1]
        monkeypatch.setattr(mx, "async_eval", watched)
        result = pipeline.generate(PROMPT, max_tokens=16)
        monkeypatch.undo()
    assert result.token_ids == text
    assert len(passes) > result.stats.cycles
    assert launched.count(3) == len(passes), "of two layers, the first"
    after = model(family).model.layers if family == "attention" else _hybrid_layers()
    assert all(one is other for one, other in zip(layers, after, strict=True))


def _hybrid_layers() -> Any:
    return model("hybrid").language_model.model.layers


def test_taps_on_top_see_what_they_saw() -> None:
    target = new_model(num_hidden_layers=3)
    tokens = mx.array([PROMPT])
    features = []
    for choice in ("off", "every-layer"):
        with pipeline_of(
            target=target, configure=lambda b, c=choice: b.kernels({"early-launch": c})
        ) as pipeline:
            adapter = pipeline._parts.target
            adapter.tap((0, 1, 2))
            output = adapter.forward(tokens, adapter.make_cache())
            features.append((output.features, output.logits))
    for one, other in zip(*features, strict=True):
        assert mx.array_equal(one, other)
