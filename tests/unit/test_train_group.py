"""Training by several processes: real ones, on this CPU, that meet through MLX's ring."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom.apps.train.batches import Batches
from draftloom.apps.train.data import Packed
from draftloom.apps.train.group import Group, Signals
from draftloom.apps.train.settings import TrainSettings
from draftloom.apps.train.toy import make_toy
from draftloom.errors import UsageError

WORKER = Path(__file__).parents[1] / "support" / "train_worker.py"
SETTINGS: dict[str, Any] = {
    "steps": 6, "batch": 2, "context": 16, "anchors": 16, "eval_prompts": 1, "eval_tokens": 4,
    "eval_every": 0, "save_every": 0, "log_every": 3, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, texts, and lines of one length whose blocks count alike."""
    folder = make_toy(tmp_path_factory.mktemp("toy"), steps=1)
    stream = random.Random(0)
    with (folder / "equal.jsonl").open("w") as file:
        for _ in range(40):
            ids = [stream.randrange(2, 30) for _ in range(16)]
            file.write(json.dumps({"prompt_ids": ids[:4], "response_ids": ids[4:]}) + "\n")
    return folder


def environments(count: int, folder: Path) -> list[dict[str, str]]:
    """What `mlx.launch` gives each process of a ring."""
    hosts = []
    for _ in range(count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            hosts.append([f"127.0.0.1:{free.getsockname()[1]}"])
    file = folder / f"hosts-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(hosts))
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    if count == 1:
        return [own]
    return [{**own, "MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)} for rank in range(count)]


def start(command: list[str], count: int, folder: Path) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env in environments(count, folder)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    try:
        return [(p.wait(0) if p.poll() is not None else p.wait(), *out)
                for p, out in [(p, p.communicate(timeout=100)) for p in processes]]  # fmt: skip
    finally:
        for process in processes:
            process.kill()


def train(toy: Path, out: Path, count: int, **given: Any) -> list[dict[str, Any]]:
    """How each process ended."""
    settings = {**SETTINGS, **given.pop("settings", {})}
    given = {"toy": str(toy), "data": str(toy / "equal.jsonl"), "out": str(out), **given}
    command = [sys.executable, str(WORKER), json.dumps({**given, "settings": settings})]
    found = ended(start(command, count, out.parent))
    assert [code for code, *_ in found] == [0] * count, found
    return [json.loads(text) for _, text, _ in found]


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (out / "training" / "log.jsonl").read_text().splitlines()]


def state(out: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(out / "training" / "state.safetensors"))
    assert isinstance(arrays, dict)
    return {name: array for name, array in arrays.items() if name.startswith("parameters.")}


def far(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    return max(mx.abs(mine[name] - theirs[name]).max().item() for name in mine)  # type: ignore[type-var,return-value]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_two_processes_train_as_one_with_twice_the_batch(
    toy: Path, tmp_path: Path, compiled: bool
) -> None:
    train(toy, tmp_path / "one", 1, settings={"batch": 4, "compile": compiled})
    both = train(toy, tmp_path / "two", 2, settings={"compile": compiled})
    assert both[0]["weights"] == both[1]["weights"]
    assert [p["finished"] for p in both] == [True, True]
    assert far(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = ([r for r in log(tmp_path / n) if r["kind"] == "step"] for n in ("one", "two"))
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert mine["right_by_position"] == pytest.approx(theirs["right_by_position"], abs=1e-5)
    seen = [(tmp_path / n / "README.md").read_text() for n in ("one", "two")]
    assert "| seen | 384 context tokens" in seen[0]
    assert "| seen | 384 context tokens" in seen[1]
    assert "2 x 1 x 2 processes sequences" in seen[1]


@pytest.mark.slow
def test_only_process_0_writes_and_speaks_and_a_run_goes_on(toy: Path, tmp_path: Path) -> None:
    train(toy, tmp_path / "whole", 2, settings={"log_every": 1})
    lines = log(tmp_path / "whole")
    assert [r["step"] for r in lines if r["kind"] == "step"] == list(range(1, 7))
    assert [r["step"] for r in lines if r["kind"] == "held-out"] == [0, 6]
    out = tmp_path / "stopped"
    halves = train(toy, out, 2, who=1, stop=2, settings={"log_every": 1})
    assert [(p["finished"], p["step"]) for p in halves] == [(False, 3)] * 2
    assert halves[0]["records"] == len(log(out))
    assert halves[1]["records"] == 0
    train(toy, out, 2, resume=True, settings={"log_every": 1})
    assert far(out, tmp_path / "whole") == 0
    again = [(r["step"], r["loss"]) for r in log(out) if r["kind"] == "step"]
    assert again == [(r["step"], r["loss"]) for r in lines if r["kind"] == "step"]


@pytest.mark.slow
def test_time_ends_all_processes_at_one_step(toy: Path, tmp_path: Path) -> None:
    settings = {"steps": None, "max_minutes": 1 / 60, "log_every": 7, "eval_first": False}
    both = train(toy, tmp_path / "out", 2, settings=settings)
    assert both[0]["step"] == both[1]["step"] > 5
    assert both[0]["clock"] == both[1]["clock"] >= 1.0
    assert both[0]["weights"] == both[1]["weights"]  # the same learning rate, step by step
    assert log(tmp_path / "out")[-1]["kind"] == "held-out"


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_process_that_fails_ends_the_others(
    toy: Path, tmp_path: Path, who: int, log_every: int
) -> None:
    settings = {"log_every": log_every, "steps": 50, "save_every": 2}
    both = train(toy, tmp_path / "out", 2, who=who, raises=3, settings=settings)
    assert both[who]["error"] == "this one failed"
    assert "another process failed" in both[1 - who]["error"]
    resumed = train(toy, tmp_path / "out", 2, resume=True, settings={**settings, "steps": 50})
    assert [p["finished"] for p in resumed] == [True, True]


def command_line(toy: Path, out: Path, *more: object) -> list[str]:
    return [sys.executable, "-m", "draftloom.apps.cli", "train", "drafter", *map(str, [
        "--target", toy / "target", "--data", toy / "equal.jsonl", "--out", out,
        "--block-size", 4, "--layers", 1, "--context-length", 16, "--anchors", 16, "--batch", 2,
        "--eval-prompts", 0, "--log-every", 1, *more])]  # fmt: skip


def running(toy: Path, out: Path) -> list[subprocess.Popen[str]]:
    """Two processes that have come to a step."""
    processes = start(command_line(toy, out, "--steps", 100000), 2, out.parent)
    file, begin = out / "training" / "log.jsonl", time.monotonic()
    while not (file.exists() and '"kind": "step"' in file.read_text()):
        assert all(p.poll() is None for p in processes)
        assert time.monotonic() - begin < 100
        time.sleep(0.05)
    return processes


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
@pytest.mark.parametrize("who", [0, 1])
def test_one_that_is_told_to_end_ends_both_saved(toy: Path, tmp_path: Path, who: int) -> None:
    out = tmp_path / "out"
    processes = running(toy, out)
    processes[who].send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [code for code, *_ in found] == [130, 130], found
    assert "--resume goes on" in found[0][2]
    assert found[1][1:] == ("", "") or "ring" in found[1][2]  # it is silent
    steps = [r["step"] for r in log(out) if r["kind"] == "step"]
    assert steps == list(range(1, steps[-1] + 1))
    more = command_line(toy, out, "--steps", 100000, "--resume")
    processes = start(more, 2, tmp_path)
    begin = time.monotonic()
    while log(out)[-1]["step"] <= steps[-1] + 3:
        assert time.monotonic() - begin < 100
        time.sleep(0.05)
    processes[1 - who].send_signal(signal.SIGINT)
    assert [code for code, *_ in ended(processes)] == [130, 130]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_one_that_is_killed_ends_the_other(toy: Path, tmp_path: Path) -> None:
    processes = running(toy, tmp_path / "out")
    processes[1].kill()
    code, _, err = ended(processes)[0]
    assert code == 2, err
    assert "process 0 of 2: step" in err
    assert "the loss of another process" in err
    assert "Traceback" not in err
    assert (tmp_path / "out" / "training" / "state.safetensors").is_file()


@pytest.mark.slow
def test_mistakes_of_a_group(toy: Path, tmp_path: Path) -> None:
    def refused(*commands: list[str]) -> list[str]:
        envs = environments(2, tmp_path)
        found = ended([
            subprocess.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for c, e in zip(commands, envs, strict=True)
        ])  # fmt: skip
        assert [code for code, *_ in found] == [2, 2], found
        assert not any("Traceback" in err for *_, err in found)
        return [err for *_, err in found]

    out = tmp_path / "out"
    plain = command_line(toy, out, "--steps", 2)
    for err in refused(*[[*plain, "--features", str(tmp_path / "f")]] * 2):
        assert "of 2: a feature cache cannot be made by 2 processes together" in err
    for err in refused(*[[*plain, "--regenerate"]] * 2):
        assert "responses of the target cannot be made by 2 processes together" in err
    for err in refused(plain, [*plain, "--seed", "1"]):
        assert "process 1 begins with other settings or data than process 0" in err
    mine, theirs = refused(plain, [*plain, "--data", str(tmp_path / "nothing")])
    assert "process 0 of 2: process 1 failed before the first step" in mine
    assert "nothing cannot be read" in theirs


@pytest.mark.slow
def test_a_run_is_resumed_by_as_many_processes(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(toy, out, 2, who=0, stop=2)
    settings = {**SETTINGS, "batch": 2}
    given = {"toy": str(toy), "data": str(toy / "equal.jsonl"), "out": str(out), "resume": True}
    command = [sys.executable, str(WORKER), json.dumps({**given, "settings": settings})]
    ((code, _, err),) = ended(start(command, 1, tmp_path))
    assert code != 0
    assert "other settings: processes (processes: 2, now 1)" in err


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_parts_of_a_batch_are_what_one_process_draws(compiled: bool) -> None:
    rows = [Packed((n, *range(1, 9 + n)), (True,) * (9 + n), (0,) * (9 + n)) for n in range(7)]

    def stream(batch: int, part: tuple[int, int]) -> Batches:
        settings = TrainSettings(batch=batch, anchors=3, compile=compiled)
        return Batches(rows, lambda n: (mx.zeros((len(n), 20, 4)), None), settings, 3, part)

    whole, parts = stream(6, (0, 1)), [stream(2, (r, 3)) for r in range(3)]
    for index in range(5):
        batch, tokens = whole.batch(index)
        found = [part.batch(index) for part in parts]
        assert [t for _, t in found] == [tokens] * 3
        for name in ("anchors", "anchor_tokens", "labels", "valid"):
            joined: Any = mx.concatenate([getattr(b, name) for b, _ in found])
            assert mx.array_equal(joined, getattr(batch, name))


def test_nothing_is_joined_where_the_environment_tells_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    for given in (
        {},
        {"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"},
        {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "empty")},
    ):
        group = Group.join(given)
        assert (group.rank, group.size, group.leads) == (0, 1, True)
        assert group.say("word") == "word"
        group.agree(None)
        assert group.leave({}, 1, failed=False)
    with pytest.raises(UsageError, match="do not come together"):
        Group.join({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "missing")})


def test_signals_are_what_any_process_said() -> None:
    assert Group.heard([5.0, 0.5, 0.0, 0.5]) == Signals(clock=5.0, stop=True)
    assert Group.heard([5.0, 0.0, 0.25, 1.0]) == Signals(clock=5.0, failed=True, leaving=True)
