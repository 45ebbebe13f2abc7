"""The bundled pair opens offline and fits together; the registry of public pairs is unambiguous."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import Tokenizer

from draftloom.adapters import bundled
from draftloom.adapters.bundled import BundledPair, bundled_pairs, convert, default_pair
from draftloom.errors import ModelError

MAX_BYTES = 28_000_000
FOLDER = Path(bundled.__file__).resolve().parent
PAIRS_TOML = FOLDER.parent / "pairs.toml"


@pytest.fixture(params=sorted(bundled_pairs()))
def pair(request: pytest.FixtureRequest) -> BundledPair:
    """Each bundled pair in turn."""
    return bundled_pairs()[request.param]


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


def text_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return config.get("text_config", config)


def read_public_pairs() -> list[dict[str, Any]]:
    return tomllib.loads(PAIRS_TOML.read_text("utf-8"))["pair"]


def test_default_pair_is_bundled() -> None:
    assert default_pair() == bundled_pairs()["python-17m"]


def test_size_of_everything_bundled() -> None:
    files = [f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert 20_000_000 < sum(f.stat().st_size for f in files) <= MAX_BYTES


def test_import_loads_no_mlx() -> None:
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('alone', {str(FOLDER / '__init__.py')!r})\n"
        "import draftloom.errors\n"
        "before = {m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')}\n"
        "spec.loader.exec_module(u.module_from_spec(spec))\n"
        "after = {m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm')}\n"
        "print(len(after - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_pair_has_card_and_description(pair: BundledPair) -> None:
    assert pair.description
    assert pair.name in (pair.target.parent / "README.md").read_text("utf-8")


def test_text_is_cut_as_the_tokenizer_file_says(pair: BundledPair) -> None:
    """transformers gives some model types a pre-tokenizer of its own, whatever the file says."""
    text = "import os\n\n\nclass A:\n    def f(self, x1):\n        return  x1[0] + 2  # it's\n"
    stored = Tokenizer.from_file(str(pair.target / "tokenizer.json")).encode(text).ids
    assert mlx_lm.load(str(pair.target), lazy=True)[1].encode(text) == stored


@pytest.mark.parametrize("part", ["target", "draft"])
def test_every_tensor_opens_and_is_finite(pair: BundledPair, part: str) -> None:
    folder = getattr(pair, part)
    tensors = mx.load(str(folder / "model.safetensors"))
    quantization = read_config(folder)["quantization"]
    triplets = [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]
    assert triplets
    for name in triplets:
        words, scales = tensors[f"{name}.weight"], tensors[f"{name}.scales"]
        assert words.dtype == mx.uint32
        assert scales.shape == tensors[f"{name}.biases"].shape
        columns = words.shape[1] * 32 // quantization["bits"]
        assert columns == scales.shape[1] * quantization["group_size"]
    for name, value in tensors.items():
        if value.dtype != mx.uint32:
            assert mx.isfinite(value).all().item(), name
        if name.endswith("A_log"):
            assert value.dtype == mx.float32, name


def test_target_loads_offline_in_mlx_lm(pair: BundledPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the bundled target asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model, tokenizer = mlx_lm.load(str(pair.target))
    text = "def add(a, b):\n    return a + b\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    logits = model(mx.array([ids]))
    assert logits.shape == (1, len(ids), text_config(pair.target)["vocab_size"])
    assert mx.isfinite(logits).all().item()
    losses = mx.logsumexp(logits[:, :-1], axis=-1) - mx.take_along_axis(
        logits[:, :-1], mx.array([ids[1:]])[..., None], axis=-1
    ).squeeze(-1)
    assert losses.mean().item() < 5.0, "a uniform guess over 8,192 tokens costs 9.01"


def test_draft_fits_target(pair: BundledPair) -> None:
    target, draft = text_config(pair.target), read_config(pair.draft)
    taps = draft["dflash_config"]["target_layer_ids"]
    assert draft["vocab_size"] == target["vocab_size"]
    assert draft["hidden_size"] == target["hidden_size"]
    assert draft["num_target_layers"] == target["num_hidden_layers"]
    assert taps == sorted(set(taps))
    assert all(0 <= tap < target["num_hidden_layers"] for tap in taps)
    assert 0 <= draft["dflash_config"]["mask_token_id"] < target["vocab_size"]
    tensors = mx.load(str(pair.draft / "model.safetensors"))
    rows, words = tensors["fc.weight"].shape
    columns = words * 32 // draft["quantization"]["bits"]
    assert (rows, columns) == (draft["hidden_size"], len(taps) * target["hidden_size"])
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    assert len(layers) == draft["num_hidden_layers"] == len(draft["layer_types"])


def test_tokenizer_fits_vocabulary(pair: BundledPair) -> None:
    tokenizer = json.loads((pair.target / "tokenizer.json").read_text("utf-8"))
    ids = set(tokenizer["model"]["vocab"].values()) | {t["id"] for t in tokenizer["added_tokens"]}
    assert ids == set(range(text_config(pair.target)["vocab_size"]))


def test_pair_with_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelError, match="python-17m"):
        default_pair()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "pair.toml").write_text('description = "half a pair"\n')
    with pytest.raises(ModelError, match=r"'half' lacks target/config\.json"):
        bundled_pairs()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_quantize_matrix_is_no_worse_than_mlx(bits: int, group_size: int) -> None:
    weight = mx.random.normal((96, 384), key=mx.random.key(3)).astype(mx.bfloat16)
    spec = convert.QuantSpec(bits, group_size)

    def error(parts: tuple[mx.array, mx.array, mx.array]) -> float:
        words, scales, biases = (p.astype(mx.float32) if p.dtype != mx.uint32 else p for p in parts)
        back = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
        return (back - weight.astype(mx.float32)).square().mean().item()

    ours = error(convert.quantize_matrix(weight, spec))
    assert ours <= error(mx.quantize(weight, group_size=group_size, bits=bits))
    assert 0 < ours < 4e-5 * 4 ** (8 - bits)


def test_quantize_matrix_keeps_constant_groups() -> None:
    weight = mx.concatenate([mx.zeros((64, 64)), mx.full((64, 64), 0.5)], axis=1)
    words, scales, biases = convert.quantize_matrix(weight, convert.QuantSpec())
    assert mx.array_equal(mx.dequantize(words, scales, biases, group_size=64, bits=8), weight)


def write_tiny_source(folder: Path) -> None:
    for part in ("target", "draft"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        tensors = {
            "fc.weight": mx.random.normal((64, 128), key=mx.random.key(0)).astype(mx.bfloat16),
            "gate.weight": mx.ones((6, 128), dtype=mx.bfloat16),
            "conv1d.weight": mx.ones((64, 4, 1), dtype=mx.bfloat16),
            "norm.weight": mx.ones((64,)),
            "A_log": mx.zeros((6,)),
        }
        mx.save_safetensors(str(folder / part / "model.safetensors"), tensors)
    (folder / "target" / "tokenizer.json").write_text("{}")


def test_converter_quantizes_matrices_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_source(tmp_path / "from")
    to = tmp_path / "tiny"
    assert convert.main([str(tmp_path / "from"), str(to), "--description", 'a "tiny" pair']) == 0
    assert "1 matrices quantized, 4 tensors kept" in capsys.readouterr().out
    tensors = mx.load(str(to / "target" / "model.safetensors"))
    dtypes = {name: value.dtype for name, value in tensors.items()}
    assert dtypes == {
        "fc.weight": mx.uint32,
        "fc.scales": mx.bfloat16,
        "fc.biases": mx.bfloat16,
        "gate.weight": mx.bfloat16,
        "conv1d.weight": mx.bfloat16,
        "norm.weight": mx.float32,
        "A_log": mx.float32,
    }
    assert read_config(to / "draft")["quantization"]["bits"] == 8
    assert tomllib.loads((to / "pair.toml").read_text())["description"] == 'a "tiny" pair'
    assert (to / "target" / "tokenizer.json").is_file()


def test_converter_copies_what_is_quantized_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_source(tmp_path / "from")
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert convert.main([str(tmp_path / "from"), str(once), "--description", "x"]) == 0
    said = capsys.readouterr().out
    assert convert.main([str(once), str(twice), "--description", "x"]) == 0
    assert capsys.readouterr().out == said
    first, second = (mx.load(str(f / "target" / "model.safetensors")) for f in (once, twice))
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)
    assert read_config(once / "target") == read_config(twice / "target")


def test_converter_refuses_a_bad_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "from"), str(tmp_path / "to"), "--description", "x"]
    assert convert.main(arguments) == 2
    assert "no config.json" in capsys.readouterr().err
    write_tiny_source(tmp_path / "from")
    config = tmp_path / "from" / "target" / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "other"}}')
    assert convert.main(arguments) == 2
    assert "quantized already" in capsys.readouterr().err
    config.write_text("{}")
    bad = {"fc.weight": mx.full((64, 128), float("nan"))}
    mx.save_safetensors(str(tmp_path / "from" / "target" / "model.safetensors"), bad)
    assert convert.main(arguments) == 2
    assert "not finite" in capsys.readouterr().err


def test_public_pairs_are_well_formed() -> None:
    public = read_public_pairs()
    assert public
    for entry in public:
        assert set(entry) <= {"target", "drafter", "kind", "block_size", "note"}, entry
        assert entry["kind"] == "dflash", entry
        assert entry["target"], entry
        assert 2 <= entry.get("block_size", 16) <= 16, entry
        for name in [*entry["target"], entry["drafter"]]:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", name), name


def test_public_pairs_have_no_duplicates() -> None:
    public = read_public_pairs()
    targets = [name.casefold() for entry in public for name in entry["target"]]
    drafters = [entry["drafter"].casefold() for entry in public]
    assert len(targets) == len(set(targets))
    assert len(drafters) == len(set(drafters))
    assert not set(targets) & set(drafters)


def test_no_target_contains_the_target_of_another_drafter() -> None:
    """A name inside another would give a careless (substring) look-up two answers."""
    owner_of = {name: e["drafter"] for e in read_public_pairs() for name in e["target"]}
    for inner, drafter in owner_of.items():
        clashes = [
            outer
            for outer, other in owner_of.items()
            if inner.casefold() in outer.casefold() and drafter != other
        ]
        assert not clashes, f"{inner} is part of {clashes}"
