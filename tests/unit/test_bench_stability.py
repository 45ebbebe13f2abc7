"""tau along a text: windows, what repeats, and what the second half keeps."""

from __future__ import annotations

import json
from typing import Any

import attrs
import mlx.core as mx
import pytest

import draftloom
from draftloom import UsageError
from draftloom.apps.bench.measure import Settings, _repeated_by_window
from draftloom.apps.bench.prompts import BenchPrompt
from draftloom.apps.bench.stability import (
    render_stability,
    run_stability,
    stability_table,
    types_of,
    windows_of,
)

from . import fakes
from .test_bench_report import marks, plots


def run(variant: str, windows: list[list[int]], repeated: list[float]) -> dict[str, Any]:
    return {"variant": variant, "windows": windows, "repeated_by_window": repeated}


def report() -> dict[str, Any]:
    made: dict[str, Any] = {
        "target": "a <model>",
        "machine": {"device": "chip", "backend": "cpu", "system": "Linux"},
        "versions": {"mlx": "1"},
        "date": "2026-01-01",
        "settings": {
            "lengths": [48], "repeats": 1, "warm_up": 2, "cool_down": 0.0, "stop_at_eos": False,
            "window": 16,
        },
        "variants": [{"name": "float32", "parts": {}}, {"name": "bfloat16", "parts": {}}],
        "runs": [
            run("float32", [[4, 12], [4, 12], [2, 6]], [0.0, 0.0, 0.5]),
            run("float32", [[8, 8], [8, 8], [8, 8]], [0.0, 0.0, 0.1]),
            run("bfloat16", [[4, 12], [4, 4], [0, 0]], [0.0, 0.0]),
        ],
    }  # fmt: skip
    made["stability"] = windows_of(made)
    return made


def test_tau_is_pooled_over_the_prompts_with_their_range() -> None:
    full, half = report()["stability"]
    assert [w["tau"] for w in full["windows"]] == [1 + 20 / 12, 1 + 20 / 12, 1 + 14 / 10]
    assert (full["windows"][0]["low"], full["windows"][0]["high"]) == (2.0, 4.0)
    assert full["windows"][2]["repeated"] == pytest.approx(0.3)
    assert full["windows"][2]["texts"] == 2
    assert [w["tau"] for w in half["windows"]] == [4.0, 2.0]  # a window without cycles says nothing
    assert full["kept"] == pytest.approx((1 + 14 / 10) / (1 + 20 / 12))
    assert windows_of({**report(), "runs": []})[0]["kept"] is None


def test_table_and_page() -> None:
    made = report()
    title, headers, rows = stability_table(made)
    assert title.startswith("tau by 16 tokens")
    assert headers[:4] == ["tokens", "float32", "range", "repeated"]
    assert [row[0] for row in rows] == ["0-15", "16-31", "32-47", "second half / first"]
    assert rows[2] == ["32-47", "2.40", "2.00-4.00", "30%", "-", "-", "-"]
    assert rows[3][1] == "0.900"
    page = render_stability(made)
    taus, shares = plots(page)
    assert taus.get("aria-label") == "acceptance length over the text"
    assert (len(marks(taus)), len(marks(shares))) == (5, 5)
    heights = [float(mark.get("cy", "0")) for mark in marks(taus)]
    assert heights[0] == heights[1] < heights[2]  # SVG counts from the top
    assert "a &lt;model&gt;" in page
    assert "<script" not in page


def test_runs_of_eight_tokens_that_were_there_before() -> None:
    text = [*range(8), *range(8), *range(8), *range(100, 108)]
    shares = _repeated_by_window(text, 8)
    assert shares == (0.0, 1 / 8, 1.0, 0.0)  # the first run that repeats ends at token 15
    assert _repeated_by_window(text[:5], 8) == ()


def test_types() -> None:
    assert types_of("float32, bfloat16") == ("float32", "bfloat16")
    with pytest.raises(UsageError, match="--types"):
        types_of("float32,")


class Loads:
    """Hands out a tiny hybrid for any reference, in the type that is asked for."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.types: list[str] = []

    @draftloom.hookimpl(tryfirst=True)
    def load_model(self, model: Any, dtype: str) -> draftloom.LoadedModel:
        self.types.append(dtype)
        made = fakes.new_model(fakes.HYBRID)
        made.set_dtype(mx.bfloat16 if dtype == "bfloat16" else mx.float32)
        return draftloom.LoadedModel(made, Tokens())


class Tokens(fakes.OneTokenEach):
    """A tokenizer of the tiny vocabulary."""

    chat_template = None

    @staticmethod
    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) % fakes.VOCAB for c in text]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(fakes.HYBRID))
    loads = Loads(folder)
    builder = draftloom.PipelineBuilder(folder, plugins=fakes.plugins(loads))
    builder = builder.drafter("prompt-lookup").width(3)
    prompts = [BenchPrompt("code", "abcabcabc"), BenchPrompt("code", "hello")]
    settings = Settings(lengths=(40,), warm_up=2, repeats=3, window=16)
    return loads, run_stability(builder, ("float32", "bfloat16"), prompts, settings)


def test_each_type_writes_every_text(written: tuple[Any, dict[str, Any]]) -> None:
    loads, made = written
    assert loads.types == ["float32", "bfloat16"]
    assert [v["name"] for v in made["variants"]] == ["float32", "bfloat16"]
    assert [(r["variant"], r["prompt"]) for r in made["runs"]] == [
        ("float32", 0), ("float32", 1), ("bfloat16", 0), ("bfloat16", 1),
    ]  # fmt: skip
    for one in made["runs"]:
        assert one["tokens"] == 40
        assert len(one["windows"]) == 3
        assert 1 + sum(c + a for c, a in one["windows"]) >= 40  # the last cycle may be cut
    for entry in made["stability"]:
        assert [w["window"] for w in entry["windows"]] == [0, 1, 2]
        assert all(w["tau"] >= 1 and w["texts"] == 2 for w in entry["windows"])


def test_a_text_is_as_long_as_the_context_holds(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(fakes.HYBRID | {"max_position_embeddings": 64})
    )
    builder = draftloom.PipelineBuilder(tmp_path, plugins=fakes.plugins(Loads(tmp_path)))
    builder = builder.drafter("prompt-lookup").width(3)
    settings = Settings(lengths=(), warm_up=2, window=16)
    made = run_stability(builder, ("float32",), [BenchPrompt("code", "ab" * 7)], settings)
    assert made["settings"]["lengths"] == [64 - 14]
    with pytest.raises(UsageError, match="context holds 64"):
        run_stability(
            builder,
            ("float32",),
            [BenchPrompt("code", "ab")],
            attrs.evolve(settings, lengths=(80,)),
        )


@pytest.mark.parametrize(
    ("drafter", "types", "words"),
    [
        ("none", ("float32",), "drafts nothing"),
        ("prompt-lookup", ("float32", "float32"), "given twice"),
    ],
)
def test_what_says_nothing_is_refused(drafter: str, types: tuple[str, ...], words: str) -> None:
    builder = draftloom.PipelineBuilder(plugins=fakes.plugins()).model(fakes.model())
    with pytest.raises(UsageError, match=words):
        run_stability(builder.drafter(drafter), types, [], Settings())
