"""Repositories that cannot be had, or are refused: what a user is told."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftloom import PipelineBuilder
from draftloom.adapters.hub import Hub, Repository
from draftloom.errors import ModelError
from draftloom.model_info import ModelInfo

from .test_hub_server import HubServer, folder_files, hub_server

NAME = Repository("lab/tiny")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    """A hub; every test adds its own repositories."""
    with hub_server() as running:
        yield running


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    """Access to the server with an empty cache."""
    server.repos.clear()
    return Hub(cache=tmp_path / "cache", endpoint=server.url)


def refused(error: pytest.ExceptionInfo[ModelError]) -> str:
    """The message; it is one line, and so is the hint."""
    assert "\n" not in str(error.value)
    assert error.value.hint
    return error.value.message


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", "lab/tiny is gated, and you are not logged in"),
        (403, "GatedRepo", "lab/tiny is gated, and your account may not read it"),
        (401, "", "the hub answers 401, you are not logged in or your token is not valid"),
        (403, "", "the hub answers 403, your token may not read it"),
        (401, "RepoNotFound", "no hub repository lab/tiny (or it is private)"),
        (404, "RepoNotFound", "no hub repository lab/tiny (or it is private)"),
        (429, "", "the hub answers 429, too many requests"),
        (500, "", "the hub answers 500, it has a problem of its own"),
    ],
)
def test_statuses(
    hub: Hub, server: HubServer, tiny: Path, status: int, code: str, words: str
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    repo.status, repo.error = status, code
    with pytest.raises(ModelError) as error:
        hub.locate(NAME)
    assert words in refused(error)


def test_a_private_repository(
    hub: Hub, server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("lab/tiny", folder_files(tiny)).secret = "right"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ModelError, match="or it is private"):
        hub.locate(NAME)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ModelError, match="your token is not valid"):
        hub.locate(NAME)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert hub.locate(NAME).is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.safetensors": None}, "has no weights as model*.safetensors"),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "it holds pytorch_model.bin"),
        ({"config.json": None}, "has no config.json"),
        ({"config.json": b"{"}, "config.json cannot be read"),
        ({"config.json": {"model_file": "m.py"}}, "needs code of its own (model_file in"),
        ({"config.json": {"model_type": "no-such", "auto_map": {"AutoModel": "m.M"}}}, "auto_map"),
    ],
    ids=["no-weights", "pickles", "no-config", "broken-config", "model-file", "auto-map"],
)
def test_repositories_that_are_refused(
    hub: Hub, server: HubServer, tiny: Path, change: dict[str, object], words: str
) -> None:
    files = folder_files(tiny)
    for name, content in change.items():
        if isinstance(content, dict):
            content = json.dumps({**json.loads(files[name]), **content}).encode()
        files.pop(name, None)
        if isinstance(content, bytes):
            files[name] = content
    server.add("lab/tiny", {**files, "m.py": b"raise SystemExit('ran')"})
    with pytest.raises(ModelError) as error:
        hub.locate(NAME)
    assert words in refused(error)
    assert hub.cache is not None
    assert not list(hub.cache.rglob("model*.safetensors"))


def test_auto_map_of_a_known_family_is_left_alone(hub: Hub, server: HubServer, tiny: Path) -> None:
    files = folder_files(tiny)
    config = {**json.loads(files["config.json"]), "auto_map": {"AutoModel": "m.M"}}
    server.add("lab/tiny", {**files, "config.json": json.dumps(config).encode()})
    assert hub.locate(NAME).is_dir()


def test_a_local_folder_is_refused_its_own_code(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "m.py"}))
    plugins = PipelineBuilder().plugins
    with pytest.raises(ModelError, match="needs code of its own"):
        plugins.load_model(ModelInfo.from_path(folder), "auto")
