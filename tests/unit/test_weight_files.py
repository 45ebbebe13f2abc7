"""Weights that are not what they should be: file, tensor and shapes are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from draftloom import ModelError, ModelInfo
from draftloom.adapters import weights
from draftloom.adapters.weight_files import check_weight_files, file_of
from tests.support import models

CONFIG = models.FAMILIES["qwen3"].config | {"hidden_size": 64, "intermediate_size": 96}
BIG = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target in two shards with an index; its embeddings have more than 65,536 numbers."""
    folder = tmp_path_factory.mktemp("whole")
    config = CONFIG | {"vocab_size": 1100}
    model = models.new(models.FAMILIES["qwen3"], **{k: config[k] for k in CONFIG | config})
    tensors: Any = sorted(tree_flatten(model.parameters()))
    shards = {"model-00001-of-00002.safetensors": dict(tensors[:9])}
    shards["model-00002-of-00002.safetensors"] = dict(tensors[9:])
    for name, part in shards.items():
        mx.save_safetensors(str(folder / name), part)
    placed = {tensor: name for name, part in shards.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "target"))


def rewrite(folder: Path, name: str, value: mx.array | None) -> Path:
    """Another value for a tensor, or none; returns its file."""
    file = next(t.file for t in check_weight_files(folder) if t.name == name)
    loaded: Any = mx.load(str(file))
    held = {k: mx.array(v) for k, v in loaded.items()}
    mx.eval(held)
    if value is None:
        del held[name]
    else:
        held[name] = value
    mx.save_safetensors(str(file), held)
    return file


def refused(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        weights.load(ModelInfo.from_path(folder), "auto")
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_sound_one_loads(folder: Path) -> None:
    loaded = weights.load(ModelInfo.from_path(folder), "auto")
    assert loaded is not None
    assert len(check_weight_files(folder)) == len(tree_flatten(loaded.model.parameters()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_one_bad_number_in_a_large_tensor(folder: Path, number: str, dtype: mx.Dtype) -> None:
    value = mx.zeros((1100, 64), dtype=dtype)
    assert value.size > 2**16
    value[1099, 63] = float(number)
    file = rewrite(folder, BIG, value)
    error = refused(folder)
    assert f"{file}: tensor {BIG} holds numbers that are not finite" in str(error)


def test_every_tensor_is_looked_at(folder: Path) -> None:
    for tensor in check_weight_files(folder):
        spoilt = Path(shutil.copytree(folder, folder.parent / tensor.name))
        value = mx.ones(tensor.shape)
        value[(-1,) * len(tensor.shape)] = mx.nan
        rewrite(spoilt, tensor.name, value)
        assert f"tensor {tensor.name} holds" in str(refused(spoilt))


def test_a_sum_that_overflows_is_no_bad_number(folder: Path) -> None:
    rewrite(folder, BIG, mx.full((1100, 64), 60000.0, dtype=mx.float16))
    assert weights.load(ModelInfo.from_path(folder), "float16") is not None


def test_weights_come_some_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "GROUP_BYTES", 1)
    value = mx.ones((64,))
    value[0] = mx.nan
    rewrite(folder, "model.norm.weight", value)
    assert "model.norm.weight" in str(refused(folder))


@pytest.mark.parametrize("shape", [(1100, 65), (1101, 64), (1100,)])
def test_wrong_shapes(folder: Path, shape: tuple[int, ...]) -> None:
    file = rewrite(folder, BIG, mx.zeros(shape))
    message = str(refused(folder))
    assert f"{file}: tensor {BIG} has shape {shape}, the config asks for (1100, 64)" in message


def test_a_tensor_too_few_and_one_too_many(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    rewrite(folder, BIG, None)
    assert f"{folder} lacks tensor {BIG}" in str(refused(folder))
    file = rewrite(other, BIG, mx.zeros((1100, 64)))
    loaded: Any = mx.load(str(file))
    mx.save_safetensors(str(file), {**loaded, "model.layers.0.gate.weight": mx.zeros((2, 2))})
    message = str(refused(other))
    assert f"{file} has a tensor that the config has no place for: model.layers.0.gate" in message


def test_an_index_that_places_tensors_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    placed["weight_map"]["model.layers.0.extra.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(placed))
    error = refused(folder)
    assert str(folder / "model-00002-of-00002.safetensors") in error.message
    assert "lacks tensor model.layers.0.extra.weight" in error.message
    assert "two downloads" in error.hint
    for text in ("{}", '{"weight_map": [1]}', '{"weight_map": 3}', "["):
        index.write_text(text)
        assert "model.safetensors.index.json cannot be read" in refused(folder).message


def test_a_missing_and_a_half_downloaded_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert f"{shard} is not a whole safetensors file: it has" in refused(folder).message
    shard.write_bytes(data[:4])
    assert f"{shard} is not a whole safetensors file" in refused(folder).message
    shard.unlink()
    assert f"lacks {shard.name}, which its index names" in refused(folder).message


def test_names_that_families_change_while_loading(folder: Path) -> None:
    stored = check_weight_files(folder)
    found = file_of("language_model.model.layers.1.mlp.up_proj.weight", stored)
    assert found is not None
    assert found.name == "model.layers.1.mlp.up_proj.weight"
    assert file_of("something.else", stored) is None
