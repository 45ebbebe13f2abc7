"""The command line against a hub, as a process of its own: models by name, offline, mistakes."""

import json
import os
import pty
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from draftloom.adapters.bundled import default_pair

from .conftest import Finished, write_target
from .test_hub_server import HubServer, folder_files, hub_server

FEW = ("--max-tokens", "4", "--raw", "--json")
Process = Callable[..., Finished]


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A hub."""
    with hub_server() as running:
        yield running
        running.release.set()


@pytest.fixture
def home(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose hub is the server, with an empty cache."""
    home = tmp_path / "home"
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    (home / "config" / "draftloom").mkdir(parents=True)
    return home


def test_a_target_by_name_then_offline(
    process: Process, server: HubServer, home: Path, tiny: Path
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    command = ("generate", "import os", "--drafter", "prompt-lookup", *FEW)
    done = process(*command, "--target", "lab/tiny")
    assert (done.code, done.err) == (0, "")
    assert done.json["pipeline"]["target"] == "lab/tiny"
    plain = process(*command, "--target", tiny)
    assert done.json["token_ids"] == plain.json["token_ids"]
    server.asked.clear()
    again = process(*command, "--target", f"lab/tiny@{repo.refs['main']}", "--offline")
    assert again.json["token_ids"] == done.json["token_ids"]
    assert server.asked == []
    repo.status = 500
    down = process(*command, "--target", "lab/tiny")
    assert down.json["token_ids"] == done.json["token_ids"]
    (warning,) = down.err.splitlines()
    assert warning.startswith("draftloom: using the cached copy of lab/tiny: ")
    assert "the hub answers 500" in warning


@pytest.mark.slow
def test_a_pair_of_the_users_file(process: Process, server: HubServer, home: Path) -> None:
    pair = default_pair()
    server.add("lab/py-q4", folder_files(pair.target))
    server.add("lab/py-DFlash", folder_files(pair.draft))
    (home / "config" / "draftloom" / "pairs.toml").write_text(
        '[quantizations]\nsuffixes = ["-q4"]\n'
        '[[pair]]\ntarget = ["lab/py"]\ndrafter = "lab/py-DFlash"\n'
    )
    prompt = ("generate", "def add(a, b):", *FEW)
    done = process(*prompt, "--target", "lab/py-q4")
    assert (done.code, done.err) == (0, "")
    assert done.json["pipeline"]["drafter"] == "dflash"
    assert done.json["token_ids"] == process(*prompt).json["token_ids"]
    server.asked.clear()
    listed = process("models", "--json")
    report = json.loads(listed.out)
    assert report["cache"].startswith(str(home))
    rows = {row["target"]: row for row in report["pairs"]}
    assert next(iter(rows)) == pair.name
    assert rows["lab/py"]["target_cached"] == "no"
    mine = rows["lab/py-q4"]
    assert (mine["drafter"], mine["target_cached"], mine["drafter_cached"]) == (
        "lab/py-DFlash", "yes", "yes",
    )  # fmt: skip
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (pair.target, pair.draft)]
    assert mine["weight_bytes"] == sum(sizes)
    assert mine["fits"] is True
    assert rows["Qwen/Qwen3-8B"]["fits"] is None
    assert report["memory_bytes"] > 0
    table = process("models")
    assert table.code == 0
    assert "lab/py-q4" in table.out
    assert server.asked == [], "models asks no hub"


@pytest.mark.slow
def test_a_killed_download(
    process: Process, program: str, server: HubServer, home: Path, tiny: Path
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    repo.stall = "model.safetensors"
    command = ("generate", "import", "--target", "lab/tiny", "--drafter", "none", *FEW)
    with subprocess.Popen([program, *command], stderr=subprocess.DEVNULL) as running:
        assert server.stalled.wait(60)
        running.kill()
    offline = process(*command, "--offline")
    offline.assert_mistake("the weights are missing", "this run is offline")
    repo.stall = ""
    done = process(*command)
    assert (done.code, done.err) == (0, "")


def test_progress_on_a_terminal(
    program: str, server: HubServer, home: Path, tiny: Path, tmp_path: Path
) -> None:
    server.add("lab/tiny", folder_files(tiny))
    master, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [program, "generate", "import", "--target", "lab/tiny", "--drafter", "none", *FEW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal) as running:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(master, 4096):
                shown += piece
        except OSError:  # Linux says so when the other side has closed
            pass
        out = running.communicate()[0]
    os.close(master)
    assert running.returncode == 0
    assert b"100%" in shown
    assert json.loads(out)["pipeline"]["target"] == "lab/tiny"


CASES = {
    "unknown": ("lab/none", {}, "no hub repository lab/none (or it is private)"),
    "gated": ("lab/tiny", {"status": 403, "error": "GatedRepo"}, "lab/tiny is gated"),
    "private": ("lab/tiny", {"secret": "x"}, "(or it is private)"),
    "broken": ("lab/tiny", {"status": 500}, "the hub answers 500"),
}
QUICK = ("unknown", "gated")


@pytest.mark.parametrize(
    "case", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_mistakes(process: Process, server: HubServer, home: Path, tiny: Path, case: str) -> None:
    name, fault, words = CASES[case]
    repo = server.add("lab/tiny", folder_files(tiny))
    for key, value in fault.items():
        setattr(repo, key, value)
    process("generate", "x", "--target", name).assert_mistake(words)


def test_a_drafter_that_is_not_there(
    process: Process, server: HubServer, home: Path, tiny: Path
) -> None:
    done = process("generate", "x", "--target", tiny, "--drafter", "lab/none")
    done.assert_mistake("drafter", "no hub repository lab/none")


@pytest.mark.slow
def test_code_is_never_run(process: Process, server: HubServer, home: Path, tmp_path: Path) -> None:
    folder = write_target(tmp_path / "model", model_file="own.py")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    server.add("lab/own", folder_files(folder))
    for target in ("lab/own", folder):
        done = process("generate", "x", "--target", target, "--drafter", "none")
        done.assert_mistake("needs code of its own", "never run")
    assert not (tmp_path / "ran").exists()
    assert "own.py" not in server.fetched()


@pytest.mark.slow
def test_offline_without_a_cache(process: Process, server: HubServer, home: Path) -> None:
    process("generate", "x", "--target", "lab/tiny", "--offline").assert_mistake("offline")
    assert server.asked == []
