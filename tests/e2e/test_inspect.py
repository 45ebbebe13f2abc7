"""`plugins`, `pipeline show|check`, `doctor`, `--help`, `--version`, commands of plugins."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import draftloom
from draftloom.adapters.bundled import default_pair
from draftloom.plugins import KINDS, PluginManager
from draftloom.spec import PipelineSpec

# --- start-up --------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_and_version_wait_for_no_model_library(process: Callable[..., Any]) -> None:
    version = process("--version")
    assert (version.code, version.out) == (0, f"draftloom {draftloom.__version__}\n")
    for arguments in (["--help"], ["generate", "-h"], []):
        done = process(*arguments)
        assert (done.code, done.err) == (0, "")
        assert "Usage: draftloom" in done.out
    code = (
        "import sys\nfrom draftloom.apps.cli import run\nassert run(['generate', '--help']) == 0\n"
        "print([m for m in ('mlx.core', 'mlx_lm', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_generate_has_every_option(cli: Callable[..., Any]) -> None:
    command = typer.main.get_command(_app())
    generate = command.commands["generate"]  # type: ignore[attr-defined]
    options = {name for parameter in generate.params for name in parameter.opts}
    options |= {name for parameter in generate.params for name in parameter.secondary_opts}
    assert options >= {
        "prompt", "--prompt-file", "--target", "--drafter", "--verifier", "--acceptance",
        "--rollback", "--block-size", "--max-tokens", "--temperature", "--top-p", "--top-k",
        "--min-p", "--seed", "--stop", "--chat", "--raw", "--pipeline", "--dtype", "--trace",
        "--json",
    }  # fmt: skip


def _app() -> typer.Typer:
    from draftloom.apps.cli.app import build_app
    from draftloom.apps.cli.state import CliState

    return build_app(CliState(PluginManager(entry_points=False)))


# --- plugins ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_plugins_as_a_process(process: Callable[..., Any]) -> None:
    done = process("plugins", "--json")
    assert (done.code, done.err) == (0, "")
    listing = {plugin["name"]: plugin for plugin in json.loads(done.out)}
    drafters = listing["draftloom.drafters.plugin"]
    assert drafters["version"] == draftloom.__version__
    assert "register_drafters" in drafters["hooks"]
    assert {"dflash", "prompt-lookup", "none"} <= set(drafters["components"]["drafter"])
    kinds = {kind for plugin in listing.values() for kind in plugin["components"]}
    assert kinds >= set(KINDS) - {"node"}


class Lab:
    """A plugin with a component and a command."""

    @draftloom.hookimpl
    def register_drafters(self, register: draftloom.Register) -> None:
        info = draftloom.ComponentInfo("lab.echo", "says it again")
        register("lab.echo", lambda: None, info)

    @draftloom.hookimpl
    def register_commands(self, cli: Any) -> None:
        @cli.command()
        def greet(name: str) -> None:
            """Say hello."""
            typer.echo(f"hello {name}")


def test_plugins_as_text(cli: Callable[..., Any]) -> None:
    done = cli("plugins", plugins=[Lab()])
    assert done.code == 0
    assert "Lab  (" in done.out
    assert "lab.echo" in done.out
    assert "register_commands, register_drafters" in done.out


def test_plugins_add_commands(cli: Callable[..., Any]) -> None:
    assert cli("greet", "you", plugins=[Lab()]).out == "hello you\n"
    assert "Say hello." in cli("--help", plugins=[Lab()]).out
    cli("greet", "you").assert_mistake("greet")


class BrokenLab:
    """A plugin whose command cannot be added."""

    @draftloom.hookimpl
    def register_commands(self, cli: Any) -> None:
        raise KeyError("settings")


def test_a_broken_command_names_its_plugin(cli: Callable[..., Any]) -> None:
    done = cli("--help", plugins=[BrokenLab()])
    done.assert_mistake("'BrokenLab'", "KeyError", "uninstall")


# --- pipeline --------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, tiny: Path) -> Path:
    """A pipeline file."""
    path = tmp_path / "pipeline.toml"
    path.write_text(f'target = "{tiny.as_posix()}"\ndrafter = "prompt-lookup"\n')
    return path


@pytest.mark.slow
def test_pipeline_as_a_process(process: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    shown = process("pipeline", "show", file)
    assert (shown.code, shown.err) == (0, "")
    assert "prompt-lookup" in shown.out
    assert "verify" in shown.out
    sound = process("pipeline", "check", file)
    assert (sound.code, sound.err) == (0, "")
    assert "sound" in sound.out
    file.write_text('verifier = "blok"\nwidth = 99\nrollback = { attention = "tape-replay" }\n')
    broken = process("pipeline", "check", file)
    assert (broken.code, broken.out) == (2, "")
    first, *rest = broken.err.splitlines()
    assert first == "draftloom: error: the pipeline has 3 problems:"
    for word in ("blok", "block size 100", "attention"):
        assert any(word in line for line in rest), word


def test_pipeline_loads_no_weights(cli: Callable[..., Any], tmp_path: Path, tiny: Path) -> None:
    """The folder holds a config and nothing else."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text((tiny / "config.json").read_text())
    file = tmp_path / "pipeline.toml"
    file.write_text(f'target = "{folder.as_posix()}"\ndrafter = "none"\n')
    assert cli("pipeline", "check", file).code == 0
    assert cli("pipeline", "show", file).code == 0


def test_pipeline_as_mermaid_and_toml(cli: Callable[..., Any], file: Path, tmp_path: Path) -> None:
    mermaid = cli("pipeline", "show", file, "--mermaid")
    assert mermaid.out.startswith("flowchart TD\n")
    toml = cli("pipeline", "show", file, "--toml").out
    assert tomllib.loads(toml)["drafter"] == "prompt-lookup"
    again = tmp_path / "again.toml"
    again.write_text(toml)
    assert PipelineSpec.from_toml(toml).to_toml() == toml
    assert cli("pipeline", "show", again, "--toml").out == toml
    cli("pipeline", "show", file, "--toml", "--mermaid").assert_mistake("--mermaid")


def test_pipeline_shows_how_a_drafter_is_packed(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The option alone, for a drafter that is found by itself; in the file that it writes, too."""
    file = tmp_path / "packed.toml"
    file.write_text('drafter = { use = "auto", bits = 4 }\n')
    shown = cli("pipeline", "show", file).out
    packed = "weights packed to 4 bits, 8 outside attention and MLP, groups of 64"
    assert f"dflash      {packed}" in shown
    written = tomllib.loads(cli("pipeline", "show", file, "--toml").out)
    assert written["drafter"]["bits"] == 4
    assert written["drafter"]["use"] == "dflash"
    assert "context of the first 64 and the last 448 positions" in shown, "as it was trained"
    file.write_text('drafter = { use = "auto", window = 9, sinks = 0 }\n')
    assert "context of the last 9 positions" in cli("pipeline", "show", file).out
    file.write_text('drafter = { use = "dflash", bits = 4 }\n')  # the known checkpoint, packed
    assert packed in cli("pipeline", "show", file).out


# --- doctor ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_as_a_process(process: Callable[..., Any]) -> None:
    done = process("doctor")
    assert (done.code, done.err) == (0, "")
    for word in ("mlx", "python", "device", "float32", "dflash", "gated-delta verify", "not "):
        assert word in done.out, word


def test_doctor_as_json(cli: Callable[..., Any]) -> None:
    report = json.loads(cli("doctor", "--json").out)
    assert report["versions"]["draftloom"] == draftloom.__version__
    assert report["target"]["adapter"] == "qwen3-5"
    assert report["target"]["rollbacks"]["gated-delta"] == "tape-replay"
    assert report["device"]["backend"] in ("cpu", "cuda", "metal")
    choices = {choice["operation"]: choice for choice in report["kernels"]["choices"]}
    assert "gated-delta verify" in choices
    assert choices["gated-delta verify"]["kernel"] == "array", "tests run on the CPU"
    assert set(choices["gated-delta verify"]["rejected"]) == {"metal", "cuda"}
    assert report["dtype"]["advice"]
    assert report["memory"]["context_length"] == 4096
    assert report["memory"]["unit"] == "bytes"


def test_inspect_counts_memory(cli: Callable[..., Any], tmp_path: Path) -> None:
    target = cli("inspect", "python-17m", "--json").json["memory"]
    assert target["unit"] == "bytes"
    assert target["weights"] > 6 * 10**7, "in float32, as it is computed on a CPU"
    assert target["caches"] > 4096 * 1000
    assert cli("inspect", "python-17m-draft", "--json").json["memory"]["weights"] > 10**7
    (tmp_path / "config.json").write_text((default_pair().target / "config.json").read_text())
    assert cli("inspect", tmp_path, "--json").json["memory"]["weights"] is None


def test_doctor_counts_memory(cli: Callable[..., Any], tiny: Path) -> None:
    def memory(*options: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(cli("doctor", "--json", *options).out)["memory"]
        return found

    short, long = (memory("--context-length", n) for n in (256, 4096))
    assert short["target_weights"] == long["target_weights"] > 10**7
    assert short["caches"] < long["caches"]
    assert memory("--kv-bits", 8, "--kv-group-size", 32)["caches"] < long["caches"]
    assert memory("--prefill-step-size", 64)["prefill"] < long["prefill"]
    assert memory("--memory-limit", 2)["limit"] == 2 * 10**9
    assert memory("--drafter", "none")["drafter_weights"] == 0
    assert memory("--target", tiny)["drafter_weights"] == 0
    shown = cli("doctor", "--context-length", 1000).out
    assert "memory, at 1000 tokens" in shown
    assert "MB" in shown


def test_doctor_on_another_target(cli: Callable[..., Any], tiny: Path) -> None:
    done = cli("doctor", "--target", tiny, plugins=[Lab()])
    assert "verify-attention: array" in done.out
    assert "gated-delta verify" not in done.out
    assert "none known" in done.out
    assert "Lab (" in done.out
    cli("doctor", "--target", tiny / "missing").assert_mistake("missing")


def test_doctor_reads_no_weights(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((default_pair().target / "config.json").read_text())
    assert "gated-delta verify" in cli("doctor", "--target", tmp_path).out
