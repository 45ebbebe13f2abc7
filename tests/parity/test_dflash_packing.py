"""A DFlash drafter packed on load, and the type of its features, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from draftloom.abilities import BindContext
from draftloom.contracts import DraftRequest
from draftloom.drafters.dflash import DFlashDrafter
from draftloom.errors import UsageError
from draftloom.sampling import SamplingParams, SamplingState
from tests.parity.test_dflash import (
    VOCAB,
    FakeTarget,
    check_draft,
    features,
    reference,
    write,
)

SAMPLING = SamplingState(SamplingParams())


def opened(folder: Path, target: FakeTarget, **options: Any) -> tuple[DFlashDrafter, Any]:
    drafter = DFlashDrafter(folder, **options)
    assert not list(drafter.check(target.info))
    drafter.bind(BindContext(target, "float32", lambda path: None, lambda target: None))  # type: ignore[arg-type, return-value]
    return drafter, drafter.open(DraftRequest(((0,),), SAMPLING, VOCAB))


# --- packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_drafter_drafts_as_what_its_weights_stand_for(bits: int, tmp_path: Path) -> None:
    """Attention and MLP at the bits asked for, `fc` at 8, norms untouched: each shows in the
    reference, which would not agree with any other choice."""
    folder, exact = write(tmp_path, intermediate_size=64)
    for name, weight in exact.weights.items():
        if weight.ndim == 2:
            own = 8 if name == "fc.weight" else bits
            packed = mx.quantize(mx.array(weight.astype(np.float32)), group_size=32, bits=own)
            exact.weights[name] = np.array(mx.dequantize(*packed, group_size=32, bits=own))
    target = FakeTarget()
    drafter, session = opened(folder, target, bits=bits)
    taps = features(1, 12)
    session.observe(([0] * 12,), mx.array(taps))
    check_draft(session, target, exact, taps, 9)
    plain = reference(folder).hidden(target.embedding[[7] + [39] * 9], taps[0])
    packed_hidden = exact.hidden(target.embedding[[7] + [39] * 9], taps[0])
    assert np.abs(plain - packed_hidden).max() > 1e-3, "the case shows nothing"
    outer = "" if bits == 8 else ", 8 outside attention and MLP"
    assert drafter.info.details.startswith(f"weights packed to {bits} bits{outer}, groups of 32")


def test_packed_weights_take_less_memory(tmp_path: Path) -> None:
    """4 bits and two float32 numbers a group of 64 are 5 bits a weight, against 32."""
    folder, _ = write(tmp_path, intermediate_size=256, head_dim=64, hidden_size=64)
    sizes = {}
    for bits in (None, 4):
        drafter = DFlashDrafter(folder, bits=bits)
        target: Any = FakeTarget()
        target.embed = lambda tokens: mx.zeros((*tokens.shape, 64))
        drafter.bind(BindContext(target, "float32", lambda path: None, lambda target: None))  # type: ignore[arg-type, return-value]
        model: Any = drafter._loaded.network
        sizes[bits] = sum(v.nbytes for _, v in tree_flatten(model.layers[0].parameters()))
        kinds = {type(m) for _, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert kinds == (set() if bits else {nn.Linear})
    assert sizes[4] < 0.2 * sizes[None]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 5}, "4 or 8 bits, got 5"),
        ({"bits": True}, "4 or 8 bits, got True"),
        ({"bits": 4, "group_size": 48}, "must be 32, 64 or 128, got 48"),
        ({"group_size": 32}, "group_size is given, bits are not"),
    ],
)
def test_packing_out_of_range(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    with pytest.raises(UsageError, match=says):
        DFlashDrafter(folder, **options)


def test_widths_that_cannot_be_grouped_are_refused_before_weights(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)  # 40 wide inside the MLP
    (folder / "model.safetensors").unlink()
    target = FakeTarget()
    (problem,) = DFlashDrafter(folder, bits=4).check(target.info)
    assert "layers.0.mlp.down_proj is 40 wide, no multiple of 32 or 64 or 128" in str(problem)
    assert "\n" not in str(problem)
    folder, _ = write(tmp_path / "64", intermediate_size=64)
    (problem,) = DFlashDrafter(folder, bits=8, group_size=64).check(target.info)
    assert "fc is 96 wide, no multiple of 64 (try another group size)" in str(problem)
    assert not list(DFlashDrafter(folder, bits=8, group_size=32).check(target.info))


# --- the type of the features -----------------------------------------------------------------


def hidden_of(folder: Path, taps: mx.array, target: FakeTarget) -> np.ndarray:
    session = opened(folder, target)[1]
    session.observe(([0] * taps.shape[1],), taps)
    mx.eval(session.propose(mx.array([4], dtype=mx.int32), 6, SAMPLING).tokens)
    return target.hidden


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", "stored", "packed"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_features_come_in_the_type_of_training(key: str, name: str, tmp_path: Path) -> None:
    """float32 taps of a target under --dtype float32 count as if they had been rounded, whether the
    config says the type or only the stored tensors do; the drafter still computes in float32."""
    config = {} if key in ("stored", "packed") else {key: name}
    if key == "packed":
        config = {"quantization": {"group_size": 32, "bits": 8}}
    folder, _ = write(tmp_path, intermediate_size=64, **config)
    if not config or key == "packed":
        weights = {
            k: v.astype(getattr(mx, name))
            for k, v in mx.load(str(folder / "model.safetensors")).items()  # type: ignore[union-attr]
        }
        for k in [k for k in weights if k.endswith("proj.weight") or k == "fc.weight"]:
            if key == "packed":
                stem = k.removesuffix(".weight")
                parts = mx.quantize(weights[k], group_size=32, bits=8)
                for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
                    weights[f"{stem}.{part}"] = value
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
    taps = mx.array(features(1, 9))
    rounded = taps.astype(getattr(mx, name)).astype(mx.float32)
    target = FakeTarget()
    ours = hidden_of(folder, taps, target)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, hidden_of(folder, rounded, target))
    # The same weights, said to be trained in float32, see the difference.
    settings = (folder / "config.json").read_text(encoding="utf-8")
    plain = settings.replace(f'"{name}"', '"float32"') if key in config else (
        settings.replace('"architectures"', '"dtype": "float32", "architectures"')
    )  # fmt: skip
    (folder / "config.json").write_text(plain, encoding="utf-8")
    assert not np.array_equal(ours, hidden_of(folder, taps, target))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_features_of_a_narrower_target_do_not_widen_the_context(name: str, tmp_path: Path) -> None:
    """A float32 drafter behind a target that computes in few bits keeps its context in few bits."""
    folder, _ = write(tmp_path, dtype="float32")
    target: Any = FakeTarget()
    narrow = getattr(mx, name)
    embedding = mx.array(target.embedding).astype(narrow)
    target.embed = lambda tokens: embedding[tokens]
    target.head = lambda hidden: hidden @ embedding.T
    session = opened(folder, target)[1]
    session.observe(([0] * 5,), mx.array(features(1, 5)).astype(narrow))
    mx.eval(session.propose(mx.array([4], dtype=mx.int32), 3, SAMPLING).tokens)
    assert {entry.arrays[0].dtype for entry in session._context._cache} == {narrow}


def test_features_beyond_float16_do_not_become_infinite(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, dtype="float16")
    taps = features(1, 4)
    taps[0, 1, 3] = 1e6
    session = opened(folder, FakeTarget())[1]
    session.observe(([0] * 4,), mx.array(taps))
    draft = session.propose(mx.array([4], dtype=mx.int32), 3, SAMPLING)
    assert draft.healthy.tolist() == [True]
