"""`draftloom audit`: identical, tie or bug; and the comparing logic by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import draftloom
from draftloom.apps import audit
from draftloom.apps.cli.audit import read_prompts
from draftloom.apps.prompts import AUDIT_PROMPTS
from draftloom.errors import UsageError

LOOKUP = ("--drafter", "prompt-lookup", "--block-size", 4, "--max-tokens", 12)


# --- the logic -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((), (), None),
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 9, 3), 1),
        ((1, 2), (1, 2, 3), 2),
        ((1, 2, 3), (1, 2), 2),
        ((), (1,), 0),
    ],
)
def test_first_difference(
    ours: tuple[int, ...], theirs: tuple[int, ...], expected: int | None
) -> None:
    assert audit.first_difference(ours, theirs) == expected


@pytest.mark.parametrize(
    ("dtype", "margin", "verdict"),
    [
        (mx.float32, 0.0, "tie"),
        (mx.float32, 3e-4, "tie"),
        (mx.float32, 1e-3, "bug"),
        (mx.float16, 0.125, "tie"),
        (mx.float16, 0.25, "bug"),
        (mx.bfloat16, 0.5, "tie"),
        (mx.bfloat16, 1.0, "bug"),
    ],
)
def test_verdict_depends_on_margin_and_dtype(dtype: mx.Dtype, margin: float, verdict: str) -> None:
    logits = mx.array([20.0 - margin, 3.0, 20.0]).astype(dtype)
    found = audit.judge(5, 0, 2, logits)
    assert (found.position, found.pipeline_token, found.target_token) == (5, 0, 2)
    assert found.margin == pytest.approx(margin, rel=0.1, abs=1e-6)
    assert found.verdict == verdict


def test_small_logits_do_not_make_the_bound_vanish() -> None:
    assert audit.tie_bound(mx.float32, 1e-3, -1e-3) == audit.tie_bound(mx.float32, 1.0, 0.5)
    assert audit.tie_bound(mx.float32, -30.0) == 30 * audit.tie_bound(mx.float32)


@pytest.mark.parametrize(("ours", "theirs"), [(None, 1), (1, None)])
def test_a_text_that_ends_too_soon_is_a_bug(ours: int | None, theirs: int | None) -> None:
    found = audit.judge(0, ours, theirs, mx.zeros((4,)))
    assert (found.verdict, found.margin) == ("bug", None)


def test_logits_that_are_no_numbers_are_a_bug() -> None:
    assert audit.judge(0, 0, 1, mx.array([float("nan"), 1.0])).verdict == "bug"


# --- prompts ---------------------------------------------------------------------------------


def test_prompt_files(tmp_path: Path) -> None:
    plain, named, guessed = (tmp_path / n for n in ("a.txt", "b.jsonl", "c.txt"))
    plain.write_text("first\n\n  second  \n")
    named.write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "three", "id": 3}\n')
    guessed.write_text(named.read_text())
    assert read_prompts(plain) == ["first", "  second  "]
    assert read_prompts(named) == read_prompts(guessed) == ["one\ntwo", "three"]
    for text in ('{"prompt": "x"}\nplain\n', '{"text": "x"}', '{"prompt": ""}', '{"prompt": 3}'):
        named.write_text(text)
        with pytest.raises(UsageError, match="line"):
            read_prompts(named)
    plain.write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_prompts(plain)
    with pytest.raises(UsageError, match="cannot be read"):
        read_prompts(tmp_path / "missing")


# --- the command -----------------------------------------------------------------------------


@pytest.mark.slow
def test_bundled_pair_is_identical(process: Callable[..., Any], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in AUDIT_PROMPTS[:2]))
    done = process("audit", "--prompts", prompts, "--max-tokens", 12, "--block-size", 4, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert (report["verdict"], report["identical"], report["bugs"]) == ("identical", 2, 0)
    assert report["pipeline"]["drafter"] == "dflash"
    assert report["dtype"] == "float32"
    assert [p["prompt"] for p in report["prompts"]] == list(AUDIT_PROMPTS[:2])
    for prompt in report["prompts"]:
        assert prompt["identical"]
        assert prompt["difference"] is None
        assert (prompt["tokens"], prompt["fell_back"]) == (12, "")


def test_built_in_prompts_as_text(cli: Callable[..., Any], tiny: Path) -> None:
    done = cli("audit", "--target", tiny, *LOOKUP)
    assert (done.code, done.err) == (0, "")
    *_, last = done.out.splitlines()
    count = len(AUDIT_PROMPTS)
    assert last == f"{count} of {count} identical, 0 ties, 0 bugs"


class Careless:
    """Accepts everything that was drafted."""

    info = draftloom.ComponentInfo("test.careless", preserves=draftloom.Preserves.NOTHING)

    def accept(self, draft: Any, logits: mx.array, sampling: Any) -> tuple[mx.array, mx.array]:
        best = mx.argmax(logits[:, draft.width], axis=-1).astype(mx.int32)
        return mx.full(best.shape, draft.width, dtype=mx.int32), best


class SecondBest:
    """Takes the second most likely token where the two most likely are as good as equal."""

    info = draftloom.ComponentInfo("test.second-best", preserves=draftloom.Preserves.NOTHING)

    def accept(self, draft: Any, logits: mx.array, sampling: Any) -> tuple[mx.array, mx.array]:
        second = mx.argsort(logits[:, 0], axis=-1)[:, -2].astype(mx.int32)
        return mx.zeros(second.shape, dtype=mx.int32), second


class BadPolicies:
    """A plugin."""

    @draftloom.hookimpl
    def register_acceptance_policies(self, register: draftloom.Register) -> None:
        register("test.careless", Careless)
        register("test.second-best", SecondBest)


@pytest.mark.parametrize("as_json", [True, False])
def test_a_bug_is_exit_code_1(cli: Callable[..., Any], tiny: Path, as_json: bool) -> None:
    options = ("--target", tiny, *LOOKUP, "--acceptance", "test.careless")
    done = cli("audit", *options, *["--json"] * as_json, plugins=[BadPolicies()])
    assert (done.code, done.err) == (1, "")
    if not as_json:
        assert "BUG" in done.out
        assert "margin" in done.out
        return
    assert done.json["verdict"] == "bug"
    assert done.json["bugs"] > 0
    different = [p["difference"] for p in done.json["prompts"] if not p["identical"]]
    for found in different:
        assert found["verdict"] == "bug"
        assert found["margin"] > found["bound"]
        assert found["target_logit"] - found["pipeline_logit"] == pytest.approx(found["margin"])


def test_a_tie_is_no_bug(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second most likely token, and a bound so wide that it ties."""
    monkeypatch.setattr(audit, "tie_bound", lambda *_: 100.0)
    options = ("--target", tiny, *LOOKUP, "--acceptance", "test.second-best", "--json")
    done = cli("audit", *options, plugins=[BadPolicies()])
    assert (done.code, done.json["verdict"]) == (0, "tie")
    assert done.json["ties"] == len(AUDIT_PROMPTS)


def test_reference_runs_on_the_stock_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When mlx-lm decodes, taps and recorders are out of the model."""
    seen = []
    reference = audit.run_reference

    def look(model: Any, *arguments: Any) -> audit.Reference:
        seen.extend(type(layer).__module__ for layer in model.model.layers)
        return reference(model, *arguments)

    monkeypatch.setattr(audit, "run_reference", look)
    builder = draftloom.PipelineBuilder(tiny).drafter("prompt-lookup").block_size(4)
    report = audit.run_audit(builder, ["x = 1\n"], 4)
    assert report.verdict == "identical"
    assert set(seen) == {"mlx_lm.models.qwen3"}


def test_text_that_ends_by_itself(cli: Callable[..., Any], tmp_path: Path, tiny: Path) -> None:
    """End-of-sequence and the context limit end both texts at the same token."""
    found = cli(
        "generate", "x", "--target", tiny, "--drafter", "none", "--max-tokens", 9, "--json"
    ).json  # fmt: skip
    folder = tmp_path / "ends"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    for change in ({"eos_token_id": found["token_ids"][5]}, {"max_position_embeddings": 8}):
        config = {**json.loads((tiny / "config.json").read_text()), **change}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("x\n")
        done = cli("audit", "--target", folder, *LOOKUP, "--prompts", prompts, "--json")
        assert done.code == 0
        (prompt,) = done.json["prompts"]
        assert prompt["identical"]
        assert prompt["tokens"] < 12


def test_mistakes(cli: Callable[..., Any], tmp_path: Path) -> None:
    cli("audit", "--prompts", tmp_path / "missing").assert_mistake("missing")
    cli("audit", "--max-tokens", 0).assert_mistake("--max-tokens")
    cli("audit", "--block-size", 99).assert_mistake("block size 99")
    cli("audit", "--drafter", "no-such").assert_mistake("no-such")
