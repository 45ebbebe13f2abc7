"""Which drafter a target gets: exact names, quantizations by rule, the user's own file."""

from pathlib import Path

import attrs
import pytest

from draftloom.adapters.registry import Registry, user_file
from draftloom.contracts import TargetInfo
from draftloom.errors import ModelError
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager

LLAMA = "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"
MINE = """
[quantizations]
owners = ["me"]
suffixes = ["-q2"]

[[pair]]
target = ["me/Big", "{folder}"]
drafter = "me/Small"
kind = "autoregressive"

[[pair]]
target = ["Qwen/Qwen3-8B"]
drafter = "me/Better@v2"
"""


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a file of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def write(file: Path, text: str) -> Path:
    """Write a file and its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def drafter(name: str) -> str | None:
    """The drafter that a hub name gets."""
    pair = Registry.load().find(name)
    return None if pair is None else pair.drafter


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("Qwen/Qwen3.5-9B", "z-lab/Qwen3.5-9B-DFlash"),
        ("mlx-community/Qwen3.5-9B-4bit", "z-lab/Qwen3.5-9B-DFlash"),
        ("mlx-community/Qwen3.5-27B-mxfp4", "z-lab/Qwen3.5-27B-DFlash"),
        ("mlx-community/Qwen3-8B-4bit-DWQ", "z-lab/Qwen3-8B-DFlash-b16"),
        ("lmstudio-community/Qwen3-4B-MLX-8bit", "z-lab/Qwen3-4B-DFlash-b16"),
        ("Qwen/Qwen3-8B-MLX-4bit", "z-lab/Qwen3-8B-DFlash-b16"),
        ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", LLAMA),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", "z-lab/gpt-oss-20b-DFlash"),
    ],
)  # fmt: skip
def test_targets_and_their_quantizations(target: str, expected: str) -> None:
    assert drafter(target) == expected


@pytest.mark.parametrize(
    "target",
    [
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        "mlx-community/DeepSeek-R1-0528-Qwen3-8B-4bit",
        "Qwen/Qwen3-8B-Base",
        "mlx-community/Qwen3-8B-4bit-finetune",
        "mlx-community/Qwen3-8B",
        "someone/Qwen3-8B",
        "someone/Qwen3-8B-4bit",
        "mlx-community/Qwen3-8B-2507-4bit",
        "qwen/qwen3-8b",
        "Qwen/Qwen3-8B-",
        "Qwen3-8B",
        "",
    ],
)
def test_names_that_only_look_alike(target: str) -> None:
    assert drafter(target) is None


def test_no_quantization_has_two_drafters() -> None:
    registry = Registry.load()
    owner: dict[str, str] = {}
    for pair in registry.pairs:
        for target in pair.targets:
            for name in (target, *registry.quantizations(target)):
                assert owner.setdefault(name, pair.drafter) == pair.drafter, name
    assert len(owner) > 1000


def test_the_users_file_goes_first(config_home: Path, tmp_path: Path) -> None:
    write(user_file(), MINE.format(folder=tmp_path / "model"))
    assert user_file() == config_home / "draftloom" / "pairs.toml"
    assert drafter("Qwen/Qwen3-8B") == "me/Better@v2"
    assert drafter("mlx-community/Qwen3-8B-4bit") == "me/Better@v2"
    assert drafter("me/Qwen3-4B-q2") == "z-lab/Qwen3-4B-DFlash-b16"
    assert drafter("Qwen/Qwen3-4B") == "z-lab/Qwen3-4B-DFlash-b16"
    found = Registry.load().find("anything", tmp_path / "model")
    assert found
    assert found.spec().as_data() == {"use": "autoregressive", "model": "me/Small"}


def test_home_without_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert user_file() == tmp_path / ".config" / "draftloom" / "pairs.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[pair]", "cannot be read"),
        ("pairs = 1", "unknown key pairs"),
        ("pair = 1", "not a list of tables"),
        ('[[pair]]\ndrafter = "a/b"', "pair 1: target names nothing"),
        ('[[pair]]\ntarget = "a/b"\ndrafter = "c/d"', "pair 1: target is not a list"),
        ('[[pair]]\ntarget = ["a/b"]', "pair 1: drafter is missing"),
        ('[[pair]]\ntarget = ["a/b"]\ndrafter = 3', "pair 1: drafter is not a text"),
        ('[[pair]]\ntarget = ["a/b"]\ndraftr = "c/d"', "unknown key pair 1: draftr"),
        ("[quantizations]\nsuffix = []", "unknown key quantizations.suffix"),
        ("quantizations = 1", "not a table"),
        ("[quantizations]\nsuffixes = [1]", "quantizations.suffixes is not a list"),
    ],
)
def test_mistakes_in_the_users_file(text: str, words: str) -> None:
    file = write(user_file(), text)
    with pytest.raises(ModelError) as error:
        Registry.load()
    assert words in error.value.message
    assert str(file) in error.value.message
    assert error.value.hint


def info(name: str) -> TargetInfo:
    """A target of that name."""
    plugins = PluginManager(entry_points=False)
    folder = plugins.locate_model("")
    model = ModelInfo.from_path(folder)
    return attrs.evolve(plugins.adapter_for(model).load().describe(model), name=name)


def test_the_hook_knows_revisions_and_cache_folders(tmp_path: Path) -> None:
    plugins = PluginManager(entry_points=False)
    model = ModelInfo("x", None, {"model_type": "qwen3_5"})
    for name in ("Qwen/Qwen3.5-9B@main", "Qwen/Qwen3.5-9B@refs/pr/1", "Qwen/Qwen3.5-9B"):
        spec = plugins.drafter_for(info(name), model)
        assert spec
        assert spec.as_data() == {"use": "dflash", "checkpoint": "z-lab/Qwen3.5-9B-DFlash"}
    folder = tmp_path / "models--mlx-community--Qwen3.5-9B-4bit" / "snapshots" / ("a" * 40)
    cached = attrs.evolve(model, path=folder)
    assert plugins.drafter_for(info(str(folder)), cached)
    assert plugins.drafter_for(info("someone/Qwen3.5-9B"), model) is None
