"""Fetching models from a hub: what is fetched when, and what a user is told when it fails."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftloom import PipelineBuilder
from draftloom.adapters.bundled import default_pair
from draftloom.adapters.hub import Hub, Repository
from draftloom.adapters.weight_files import check_weight_files
from draftloom.errors import ModelError

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
    server.asked.clear()
    return Hub(cache=tmp_path / "cache", endpoint=server.url)


def offline(hub: Hub) -> Hub:
    """The same cache without the hub."""
    return Hub(offline=True, cache=hub.cache, endpoint=hub.endpoint)


def refused(error: pytest.ExceptionInfo[ModelError]) -> tuple[str, str]:
    """Message and hint, each one line."""
    assert "\n" not in str(error.value)
    assert error.value.hint
    return error.value.message, error.value.hint


def incomplete(hub: Hub) -> list[Path]:
    """What an interrupted download left of weights in the cache, under whatever name."""
    assert hub.cache is not None
    return list(hub.cache.rglob("model*.safetensors"))


# --- what is fetched -----------------------------------------------------------------------------


def test_config_first_then_the_weights(hub: Hub, server: HubServer, tiny: Path) -> None:
    files = folder_files(tiny)
    extra = {"README.md": b"#", "pytorch_model.bin": b"x", "modeling.py": b"raise SystemExit"}
    server.add("lab/tiny", {**files, **extra, "onnx/config.json": b"{}"})
    folder = hub.locate(NAME)
    assert sorted(server.fetched()) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    hub.complete(folder)
    assert server.fetched() == ["model.safetensors"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    assert hub.locate(NAME) == folder
    hub.complete(folder)
    assert server.fetched() == [], "cached"


def test_a_drafter_s_weights_come_when_it_is_built(
    hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checking a pipeline needs its config; `build` asks for the rest before it is bound."""
    monkeypatch.setattr("draftloom.adapters.locate.Hub", lambda: hub)
    monkeypatch.setattr("draftloom.adapters.hub.Hub", lambda: hub)
    server.add("lab/draft", folder_files(default_pair().draft))
    builder = PipelineBuilder().drafter("lab/draft")
    plan = builder.check()
    (folder,) = plan.folders
    assert plan.names["drafter"] == "dflash"
    assert not (folder / "model.safetensors").exists()
    assert "model.safetensors" not in server.fetched()
    with builder.build():
        assert (folder / "model.safetensors").is_file()
    assert server.fetched() == ["model.safetensors"]


def test_shards_are_those_of_the_index(hub: Hub, server: HubServer, tiny: Path) -> None:
    files = folder_files(tiny)
    weights = files.pop("model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    files |= {"model.safetensors.index.json": index, "model-other.safetensors": b"no"}
    server.add("lab/tiny", {**files, names[0]: weights, names[1]: b"other"})
    folder = hub.locate(NAME)
    server.fetched()
    hub.complete(folder)
    assert sorted(server.fetched()) == names
    assert not (folder / "model-other.safetensors").exists()
    server.add("lab/gap", {**files, names[0]: weights})
    with pytest.raises(ModelError) as error:
        hub.complete(hub.locate(Repository("lab/gap")))
    assert names[1] in refused(error)[0]


def test_revisions(hub: Hub, server: HubServer, tiny: Path, tiny_chat: Path) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    first = repo.refs["main"]
    old = hub.locate(NAME)
    hub.complete(old)
    repo.commit(folder_files(tiny_chat))
    new = hub.locate(NAME)
    assert new.name == repo.refs["main"] != first
    assert "chat_template" in (new / "tokenizer_config.json").read_text()
    hub.complete(new)
    assert hub.locate(Repository("lab/tiny", first)) == old
    repo.refs["v1"] = first
    assert hub.locate(Repository("lab/tiny", "v1")) == old
    assert offline(hub).locate(Repository("lab/tiny", "v1")) == old
    with pytest.raises(ModelError) as error:
        hub.locate(Repository("lab/tiny", "v9"))
    assert refused(error)[0] == "lab/tiny has no revision 'v9'"


def test_check_loads_no_weights(
    hub: Hub, server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("lab/tiny", folder_files(tiny))
    monkeypatch.setattr("draftloom.adapters.locate.Hub", lambda: hub)
    monkeypatch.setattr("draftloom.adapters.weights.Hub", lambda: hub)
    builder = PipelineBuilder("lab/tiny").drafter("prompt-lookup")
    assert builder.check().target.name == "lab/tiny"
    assert "model.safetensors" not in server.fetched()
    with builder.build() as pipeline:
        assert pipeline.generate("import", max_tokens=4).token_ids
    assert server.fetched() == ["model.safetensors"]


# --- interrupted ---------------------------------------------------------------------------------


def test_a_broken_transfer_goes_on_where_it_broke(
    hub: Hub, server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    repo.cut["model.safetensors"] = 4096
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = hub.locate(NAME)
    hub.complete(folder)
    ranges = [r for _, path, r in server.asked if path.endswith("model.safetensors") and r]
    assert ranges == ["bytes=4096-"]
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_download_given_up_is_not_taken_for_whole(
    hub: Hub, server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    repo = server.add("lab/tiny", folder_files(tiny))
    folder = hub.locate(NAME)
    repo.file_status = 404
    with pytest.raises(ModelError):
        hub.complete(folder)
    repo.file_status = 503
    with pytest.raises(ModelError) as error:
        hub.complete(folder)
    assert "the hub answers 503" in refused(error)[0]
    assert incomplete(hub) == []
    with pytest.raises(ModelError, match="offline"):
        offline(hub).complete(folder)
    repo.file_status = 0
    hub.complete(folder)
    offline(hub).complete(folder)


def test_a_spoilt_file_is_fetched_anew_once_it_is_gone(
    hub: Hub, server: HubServer, tiny: Path
) -> None:
    server.add("lab/tiny", folder_files(tiny))
    folder = hub.locate(NAME)
    hub.complete(folder)
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:1000])
    with pytest.raises(ModelError) as error:
        check_weight_files(folder)
    message, hint = refused(error)
    assert str(folder / "model.safetensors") in message
    assert hint == f"delete {blob} and run it again"
    blob.unlink()
    with pytest.raises(ModelError):
        offline(hub).complete(folder)
    hub.complete(folder)
    check_weight_files(folder)


def test_the_disk_is_asked_first(
    hub: Hub, server: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    repo.sizes["model.safetensors"] = 17_900_000_000
    folder = hub.locate(NAME)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 3_200_000))
    server.fetched()
    with pytest.raises(ModelError) as error:
        hub.complete(folder)
    assert "17.90 GB" in refused(error)[0]
    assert "3.2 MB" in refused(error)[0]
    assert server.fetched() == []


# --- without the hub -----------------------------------------------------------------------------


def test_offline(hub: Hub, server: HubServer, tiny: Path) -> None:
    server.add("lab/tiny", folder_files(tiny))
    with pytest.raises(ModelError) as error:
        offline(hub).locate(NAME)
    assert refused(error)[0] == "lab/tiny is not (wholly) in the cache, and this run is offline"
    folder = hub.locate(NAME)
    hub.complete(folder)
    server.asked.clear()
    assert offline(hub).locate(NAME) == folder
    offline(hub).complete(folder)
    assert server.asked == []
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"not \(wholly\) in the cache"):
        offline(hub).locate(NAME)


def test_an_unreachable_hub_leaves_the_cache_in_use(
    hub: Hub, server: HubServer, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    folder = hub.locate(NAME)
    repo.status = 500
    assert hub.locate(NAME) == folder
    assert "using the cached copy of lab/tiny" in caplog.text
    away = Hub(cache=hub.cache, endpoint="http://127.0.0.1:9")
    assert away.locate(NAME) == folder
    with pytest.raises(ModelError, match="the connection failed"):
        away.complete(folder)
    with pytest.raises(ModelError, match="the connection failed"):
        away.locate(Repository("lab/other"))


def test_a_newer_commit_without_weights_names_the_whole_one(
    hub: Hub, server: HubServer, tiny: Path, tiny_chat: Path
) -> None:
    repo = server.add("lab/tiny", folder_files(tiny))
    old = hub.locate(NAME)
    hub.complete(old)
    repo.commit(folder_files(tiny_chat))
    new = hub.locate(NAME)
    with pytest.raises(ModelError) as error:
        offline(hub).complete(new)
    assert refused(error)[1] == f"whole in the cache: lab/tiny@{old.name}"


def test_names_and_folders() -> None:
    assert Repository.parse("a/b@refs/pr/1") == Repository("a/b", "refs/pr/1")
    assert Repository.parse("a/b") == Repository("a/b")
    for other in ("a", "a/b/c", "/a/b", "./a", "a/b@", "a/b@../c c", "a b/c"):
        assert Repository.parse(other) is None, other
    commit = "0" * 40
    folder = Path("/c/models--a--b/snapshots") / commit
    assert Repository.of_snapshot(folder) == Repository("a/b", commit)
    assert Repository.of_snapshot(Path("/c/datasets--a--b/snapshots") / commit) is None
    assert Repository.of_snapshot(Path("/c/models--a--b/snapshots/main")) is None
