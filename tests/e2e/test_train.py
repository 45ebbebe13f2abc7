"""`draftloom train drafter`, from files to a drafter that `generate` takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftloom.apps.train.toy import make_toy

SMALL = (
    "--block-size", "6", "--layers", "1", "--context-length", "48", "--anchors", "12",
    "--batch", "4", "--eval-prompts", "4", "--eval-tokens", "24", "--learning-rate", "3e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("toy"))


def options(toy: Path, out: Path) -> list[object]:
    return ["train", "drafter", "--target", toy / "target", "--data", toy / "texts.jsonl",
            "--out", out, *SMALL]  # fmt: skip


def held_out(out: Path) -> list[dict[str, Any]]:
    lines = (out / "training" / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "held-out"]


def losses(out: Path) -> list[tuple[int, float, float]]:
    lines = (out / "training" / "log.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "step"]
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in steps]


@pytest.mark.slow
def test_acceptance_rises_and_generate_takes_the_drafter(
    process: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "drafter"
    done = process(*options(toy, out), "--steps", 100, "--eval-every", 0)
    assert done.code == 0, done.err
    assert done.out == f"{out}\n"
    assert "tokens/s" in done.err
    first, last = held_out(out)
    assert first["step"] == 0
    assert first["tau"] < 1.1
    assert last["step"] == 100
    assert last["tau"] > 1.3
    assert last["by_position"][0] > 0.5
    assert not last["fell_back"]
    assert f"**{last['tau']:.2f}** at step 100" in (out / "README.md").read_text()

    prompt = ["generate", "one two three", "--target", toy / "target", "--max-tokens", 20, "--json"]
    drafted = process(*prompt, "--drafter", out, "--width", "fixed").json
    alone = process(*prompt, "--drafter", "none").json
    assert drafted["token_ids"] == alone["token_ids"]
    assert drafted["pipeline"]["drafter"] == "dflash"
    assert drafted["acceptance_length"] > 1.3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    program: str, toy: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "drafter"
    command = [program, *map(str, options(toy, out)), "--steps", "5000", "--log-every", "1"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        log, begin = out / "training" / "log.jsonl", time.monotonic()
        while not (log.exists() and '"kind": "step"' in log.read_text()):
            assert running.poll() is None
            assert time.monotonic() - begin < 120
            time.sleep(0.05)
        running.send_signal(number)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "saved" in err
    assert "--resume goes on" in err
    assert "Traceback" not in err
    assert (out / "training" / "state.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_process_resumes_to_the_same_losses(
    process: Callable[..., Any], program: str, toy: Path, tmp_path: Path
) -> None:
    given = ["--steps", 24, "--save-every", 4, "--log-every", 1, "--eval-every", 0]
    assert process(*options(toy, tmp_path / "whole"), *given).code == 0
    out = tmp_path / "killed"
    command = [program, *map(str, [*options(toy, out), *given])]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        log, begin = out / "training" / "log.jsonl", time.monotonic()
        while not (log.exists() and '"step": 10,' in log.read_text()):
            assert running.poll() is None
            assert time.monotonic() - begin < 120
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    assert len(losses(out)) < 24
    done = process(*options(toy, out), *given, "--resume")
    assert done.code == 0, done.err
    assert losses(out) == losses(tmp_path / "whole")
    assert held_out(out) == held_out(tmp_path / "whole")


@pytest.mark.slow
def test_target_writes_first(process: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "drafter", tmp_path / "responses"
    given = ["--steps", 2, "--eval-prompts", 0, "--regenerate", "--responses", kept,
             "--response-tokens", 12, "--prompt-tokens", 4, "--max-responses", 20]  # fmt: skip
    done = process(*options(toy, out), *given)
    assert done.code == 0, done.err
    assert "target's responses 20/20" in done.err
    lines = [x for f in kept.glob("*.jsonl") for x in f.read_text().splitlines()]
    assert len(lines) == 20
    again = process(*options(toy, tmp_path / "again"), *given)
    assert again.code == 0, again.err
    assert "target's responses" not in again.err  # they are there
    assert losses(tmp_path / "again") == losses(out)
    data = process(*options(toy, tmp_path / "data"), "--data", kept, "--steps", 2)
    assert data.code == 0, data.err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT")
def test_ctrl_c_while_the_target_writes_keeps_whole_shards(
    program: str, toy: Path, tmp_path: Path
) -> None:
    out, kept = tmp_path / "drafter", tmp_path / "responses"
    given = ["--regenerate", "--responses", kept, "--response-tokens", 40, "--prompt-tokens", 4,
             "--response-batch", 1]  # fmt: skip
    command = [program, *map(str, [*options(toy, out), *given])]
    running = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job has Ctrl-C ignored, and hands that on. No threads here yet.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        begin = time.monotonic()
        while not list(kept.glob("*.jsonl")):
            assert running.poll() is None
            assert time.monotonic() - begin < 120
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "whole shards of features and responses are kept" in err
    assert "Traceback" not in err
    assert not (out / "config.json").exists()


def test_mistakes_are_one_line(cli: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin = options(toy, out)
    cli(*begin, "--context-length", 4).assert_mistake("shorter than a block")
    cli(*begin, "--taps", "1,x").assert_mistake("--taps cannot be read")
    cli(*begin, "--features", tmp_path / "f", "--features-budget", "much").assert_mistake(
        "--features-budget cannot be read"
    )
    cli(*begin, "--resume").assert_mistake("no training run to resume")
    cli(*begin, "--responses", tmp_path / "r").assert_mistake("go with --regenerate")
    cli(*begin, "--temperature", 1).assert_mistake("go with --regenerate")
    cli(*begin, "--features-budget", "1KB").assert_mistake("--features-budget is for --features")
    cli(*begin, "--regenerate", "--response-tokens", 48).assert_mistake("no room for a prompt")
    cli(*begin, "--max-minutes", 0).assert_mistake("max_minutes must be above 0", hint=False)
    cli(*begin, "--features", tmp_path / "f", "--features-budget", "1KB").assert_mistake(
        "the budget is 1000 bytes"
    )
    outside = tmp_path / "x.jsonl"
    outside.write_text('{"tokens": [1, 5000]}\n')
    cli(*begin, "--data", outside).assert_mistake("5000", "outside the target's vocabulary")
    assert not out.exists()
    assert not (tmp_path / "f").exists()


def test_wrong_data_for_a_target_without_a_chat_template(
    cli: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    chat = tmp_path / "x.jsonl"
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat.write_text(json.dumps({"messages": messages}))
    cli(*options(toy, tmp_path / "out"), "--data", chat).assert_mistake("no chat template")
