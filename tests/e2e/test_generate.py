"""`draftloom generate`: every form of input and output, and the tokens are the target's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

import draftloom
from draftloom.plugins import PluginManager

FIELDS = {
    "memory", "width",
    "text", "token_ids", "prompt_tokens", "generated_tokens", "finish_reason", "cycles",
    "acceptance_length", "acceptance_rate", "accepted_by_position", "prefill_seconds",
    "decode_seconds", "decode_tokens_per_second", "fell_back", "mismatch", "lossless", "pipeline",
}  # fmt: skip
PARTS = {"target", "adapter", "drafter", "verifier", "acceptance", "rollback", "width"}
PROMPT = "class Stack:\n    def push(self, item):"
LOOKUP = ("--drafter", "prompt-lookup", "--block-size", 4)


@pytest.mark.slow
def test_bundled_pair_by_one_command(
    process: Callable[..., Any], own_tokens: Callable[..., list[int]], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    done = process(
        "generate", PROMPT, "--max-tokens", 24, "--block-size", 4, "--json", "--trace", trace
    )
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert set(found) == FIELDS | {"seed"}
    assert set(found["pipeline"]) == PARTS
    assert found["pipeline"]["drafter"] == "dflash"
    assert found["fell_back"] == ""
    assert (found["generated_tokens"], found["finish_reason"]) == (24, "length")
    with draftloom.load(drafter="none") as pipeline:
        prompt, model = pipeline.encode(PROMPT), pipeline.model
    assert found["prompt_tokens"] == len(prompt)
    assert found["token_ids"] == own_tokens(model, prompt, 24)
    check_trace(trace, found)


def check_trace(trace: Path, found: dict[str, Any]) -> None:
    """One record a cycle; with the prompt's own token they make up the text."""
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(1, found["cycles"] + 1))
    assert [t for r in records for t in r["token_ids"]] == found["token_ids"][1:]
    assert records[-1]["finish_reason"] == found["finish_reason"]
    accepted = sum(record["accepted"] for record in records)
    assert found["acceptance_length"] == pytest.approx(1 + accepted / found["cycles"])
    assert found["text"].endswith("".join(record["text"] for record in records))


@pytest.mark.slow
def test_text_is_all_that_a_pipe_gets(process: Callable[..., Any], tiny: Path) -> None:
    """PROMPT, --prompt-file and stdin, as processes: the same text and nothing else."""
    options = ("--target", tiny, *LOOKUP, "--max-tokens", 12)
    file = tiny.parent / "prompt.txt"
    file.write_text(PROMPT)
    runs = [
        process("generate", PROMPT, *options),
        process("generate", "--prompt-file", file, *options),
        process("generate", *options, stdin=PROMPT),
    ]
    model, tokenizer = mlx_lm.load(str(tiny))
    expected = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=12)
    assert [(r.code, r.out, r.err) for r in runs] == [(0, expected + "\n", "")] * 3


def test_prompt_file_may_be_stdin(cli: Callable[..., Any], tiny: Path) -> None:
    options = ("--target", tiny, *LOOKUP, "--max-tokens", 4, "--json")
    direct = cli("generate", PROMPT, *options).json
    piped = cli("generate", "--prompt-file", "-", *options, stdin=PROMPT.encode()).json
    assert piped["token_ids"] == direct["token_ids"]


@pytest.mark.parametrize("verifier", ["block", "sequential"])
@pytest.mark.parametrize("rollback", ["trim", "snapshot", "attention=trim"])
def test_parts_change_no_token(
    cli: Callable[..., Any],
    own_tokens: Callable[..., list[int]],
    tiny: Path,
    verifier: str,
    rollback: str,
) -> None:
    done = cli(
        "generate", PROMPT, "--target", tiny, *LOOKUP, "--max-tokens", 32, "--json",
        "--verifier", verifier, "--rollback", rollback, "--acceptance", "greedy",
        "--dtype", "float32",
    )  # fmt: skip
    found = done.json
    assert found["pipeline"]["verifier"] == verifier
    assert found["pipeline"]["rollback"] == rollback.removeprefix("attention=")
    assert found["pipeline"]["acceptance"] == "greedy"
    assert found["pipeline"]["width"] == "fixed 3"
    model, tokenizer = mlx_lm.load(str(tiny))
    assert found["token_ids"] == own_tokens(model, tokenizer.encode(PROMPT), 32)


def test_drafter_by_folder(cli: Callable[..., Any], tiny: Path) -> None:
    """The target as its own drafter: everything is accepted."""
    found = cli(
        "generate", PROMPT, "--target", tiny, "--drafter", tiny, "--block-size", 4,
        "--max-tokens", 13, "--json",
    ).json  # fmt: skip
    assert found["pipeline"]["drafter"] == "autoregressive"
    assert (found["cycles"], found["acceptance_rate"]) == (3, 1.0)
    assert found["accepted_by_position"] == [1.0, 1.0, 1.0]


def test_a_packed_drafter_changes_no_token(cli: Callable[..., Any]) -> None:
    """The bundled pair, its drafter packed to 8 bits: other drafts at most, the same text."""
    options = ("generate", "def add(a, b):", "--max-tokens", 12, "--json")
    plain, packed = cli(*options).json, cli(*options, "--drafter-bits", 8).json
    assert packed["token_ids"] == plain["token_ids"]
    assert not packed["fell_back"]


def test_a_small_drafter_window_changes_no_token(cli: Callable[..., Any]) -> None:
    options = ("generate", "def add(a, b):", "--max-tokens", 12, "--json")
    plain = cli(*options).json
    windowed = cli(*options, "--drafter-window", 3, "--drafter-sinks", 1).json
    assert windowed["token_ids"] == plain["token_ids"]
    assert not windowed["fell_back"]


def test_stop_strings(cli: Callable[..., Any], tiny: Path) -> None:
    options = ("generate", PROMPT, "--target", tiny, *LOOKUP, "--max-tokens", 40, "--json")
    whole = cli(*options).json
    text = whole["text"]
    middle = text[len(text) // 2 :][:5]
    found = cli(*options, "--stop", "no such text", "--stop", middle).json
    assert found["text"] == text[: text.index(middle)]
    assert found["finish_reason"] == "stop"
    count = found["generated_tokens"]
    assert count == len(found["token_ids"]) < 40
    assert found["token_ids"] == whole["token_ids"][:count]


def test_sampling_is_reproduced_by_its_seed(cli: Callable[..., Any], tiny: Path) -> None:
    options = (
        "generate", PROMPT, "--target", tiny, *LOOKUP, "--max-tokens", 16, "--json",
        "--temperature", 1.0, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01,
    )  # fmt: skip
    first = cli(*options, "--seed", 5).json
    assert first["seed"] == 5
    assert first["pipeline"]["acceptance"] == "speculative-sampling"
    assert cli(*options, "--seed", 5).json["token_ids"] == first["token_ids"]
    assert cli(*options, "--seed", 6).json["token_ids"] != first["token_ids"]
    drawn = cli(*options).json
    assert cli(*options, "--seed", drawn["seed"]).json["token_ids"] == drawn["token_ids"]


def test_chat_is_the_default_where_there_is_a_template(
    cli: Callable[..., Any], tiny_chat: Path
) -> None:
    options = ("generate", "hello", "--target", tiny_chat, *LOOKUP, "--max-tokens", 2, "--json")
    raw, chat, default = (cli(*options, *f).json for f in (["--raw"], ["--chat"], []))
    assert raw["prompt_tokens"] < chat["prompt_tokens"] == default["prompt_tokens"]


def test_pipeline_file_and_what_overrides_it(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_text(
        f'target = "{tiny.as_posix()}"\ndrafter = "none"\nverifier = "sequential"\n'
        "width = 0\nsampling = { temperature = 0.5, seed = 1 }\n"
    )
    options = ("generate", PROMPT, "--pipeline", file, "--max-tokens", 4, "--json")
    plain = cli(*options).json
    assert plain["pipeline"]["drafter"] == "none"
    assert plain["pipeline"]["verifier"] == "sequential"
    assert (plain["seed"], plain["pipeline"]["acceptance"]) == (1, "speculative-sampling")
    changed = cli(*options, *LOOKUP, "--verifier", "block", "--temperature", 0, "--seed", 2).json
    assert changed["pipeline"]["drafter"] == "prompt-lookup"
    assert changed["pipeline"]["verifier"] == "block"
    assert changed["pipeline"]["width"] == "fixed 3"
    assert (changed["seed"], changed["pipeline"]["acceptance"]) == (2, "greedy")


def test_trace_of_a_text_without_cycles(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    options = ("--target", tiny, *LOOKUP, "--max-tokens", 1, "--json", "--trace", trace)
    assert cli("generate", PROMPT, *options).json["cycles"] == 0
    assert trace.read_text() == ""
    longer = cli("generate", PROMPT, *options[:-4], 9, *options[-3:]).json
    check_trace(trace, longer)


class BrokenDrafter:
    """Fails in its first proposal."""

    info = draftloom.ComponentInfo("test.broken", law=draftloom.DraftLaw.DETERMINISTIC)

    def open(self, request: object) -> BrokenDrafter:
        return self

    def observe(self, committed: object, features: object) -> None:
        pass

    def propose(self, anchor: object, width: int, sampling: object) -> draftloom.Draft:
        raise RuntimeError("out of ideas")


class BrokenVerifier:
    """Fails after some passes, with and without a draft."""

    info = draftloom.ComponentInfo("test.broken")

    def __init__(self, after: int) -> None:
        self._left = after

    def verify(self, target: Any, block: Any, speculation: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("the device is gone")
        return target.forward(block, speculation.cache)


class BrokenParts:
    """A plugin."""

    @draftloom.hookimpl
    def register_drafters(self, register: draftloom.Register) -> None:
        register("test.broken", BrokenDrafter)

    @draftloom.hookimpl
    def register_verifiers(self, register: draftloom.Register) -> None:
        register("test.broken", BrokenVerifier)


def test_failing_drafter_is_said_once(
    cli: Callable[..., Any], own_tokens: Callable[..., list[int]], tiny: Path
) -> None:
    done = cli(
        "generate", PROMPT, "--target", tiny, "--drafter", "test.broken", "--max-tokens", 8,
        "--json", plugins=[BrokenParts()],
    )  # fmt: skip
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert "out of ideas" in line
    assert "going on with the target alone" in line
    assert "out of ideas" in done.json["fell_back"]
    model, tokenizer = mlx_lm.load(str(tiny))
    assert done.json["token_ids"] == own_tokens(model, tokenizer.encode(PROMPT), 8)


@pytest.mark.parametrize("after", [0, 3])
def test_failing_target_is_exit_code_1(
    cli: Callable[..., Any], tiny: Path, tmp_path: Path, after: int
) -> None:
    file, trace = tmp_path / "pipeline.toml", tmp_path / "trace.jsonl"
    file.write_text(f'verifier = {{ use = "test.broken", after = {after} }}\n')
    done = cli(
        "generate", PROMPT, "--target", tiny, *LOOKUP, "--pipeline", file, "--trace", trace,
        plugins=[BrokenParts()],
    )  # fmt: skip
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "the device is gone" in done.err.splitlines()[-1]
    assert bool(done.out) == trace.exists() == bool(after)


@pytest.mark.slow
def test_interrupt_ends_the_text_cleanly(program: str, tiny: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    folder = tmp_path / "long"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    config = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    command = (
        program, "generate", PROMPT, "--target", str(folder), "--drafter", "none",
        "--max-tokens", "500000", "--json", "--trace", str(trace),
    )  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        deadline = time.monotonic() + 120
        while not (trace.exists() and trace.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, b"")
    found = json.loads(out)
    assert found["finish_reason"] == "cancelled"
    assert found["generated_tokens"] == len(found["token_ids"]) > 0
    lines = trace.read_text().splitlines()
    assert len(lines) == found["cycles"]


@pytest.mark.slow
def test_interrupt_in_the_prompt(cli: Callable[..., Any], tiny: Path) -> None:
    """Ctrl-C while the prompt runs: an empty text that says so."""

    class PressesCtrlC:
        @draftloom.hookimpl
        def load_model(self, model: Any, dtype: str) -> Any:
            loaded = PluginManager(entry_points=False).load_model(model, dtype)
            forward = loaded.model.model

            class Pressing(type(forward)):  # type: ignore[misc]
                def __call__(self, *args: Any, **more: Any) -> Any:
                    signal.raise_signal(signal.SIGINT)
                    return super().__call__(*args, **more)

            forward.__class__ = Pressing
            return loaded

    done = cli("generate", PROMPT, "--target", tiny, *LOOKUP, "--json", plugins=[PressesCtrlC()])
    assert done.code == 0
    assert (done.json["text"], done.json["finish_reason"]) == ("", "cancelled")
    assert done.json["token_ids"] == []


class PressesTwice:
    """A plugin that observes a cycle and loses patience."""

    @draftloom.hookimpl
    def cycle_finished(self, event: draftloom.CycleEvent) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_second_interrupt_is_exit_code_130(cli: Callable[..., Any], tiny: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    done = cli("generate", PROMPT, "--target", tiny, *LOOKUP, plugins=[PressesTwice()])
    assert done.code == 130
    assert "Traceback" not in done.err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_terminal_gets_progress_and_a_summary(program: str, tiny: Path) -> None:
    """stdout and stderr on a terminal; with stdout in a pipe, the text stays plain."""
    command = [program, "generate", PROMPT, "--target", str(tiny), *map(str, LOOKUP)]
    model, tokenizer = mlx_lm.load(str(tiny))
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=8)
    screen, piped = _on_a_terminal([*command, "--max-tokens", "8"])
    assert piped == text.encode() + b"\n"
    assert b"8 tokens" in screen
    assert b"acceptance length" in screen
    assert b"prompt" in screen
    assert b"Traceback" not in screen


def _on_a_terminal(command: list[str]) -> tuple[bytes, bytes]:
    """What a terminal on stderr shows, and what a pipe on stdout gets."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL, env=environment
    ) as running:
        os.close(theirs)
        screen = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not data:
                break
            screen += data
        assert running.stdout is not None
        piped = running.stdout.read()
    os.close(ours)
    assert running.returncode == 0, screen
    return screen, piped
