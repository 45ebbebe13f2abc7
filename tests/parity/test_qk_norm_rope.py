"""Norms and rotary positions of q and k in one launch: the Metal source compiled as C++ and run
lane by lane, CUDA's prelude too, and a drafter that drafts with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from draftloom import KernelSettings
from draftloom.drafters.dflash.one_product import place_heads
from draftloom.kernels import qk_norm_rope
from draftloom.kernels.backend import Backend
from draftloom.kernels.check import difference
from draftloom.kernels.qk_norm_rope import Heads, Rotation, checks, launch, source
from tests.parity.metal_shim import builtins_in, cuda_prelude, emulator, needs_compiler
from tests.parity.test_dflash import HIDDEN, VOCAB
from tests.parity.test_packed_drafter import CONFIGS, FakeTarget, bound, drafts
from tests.support.pipelines import dflash_checkpoint

PRELUDES = {"metal": source.METAL_PRELUDE, "cuda": cuda_prelude(source.CUDA_PRELUDE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metal")


@pytest.fixture(params=["metal", "cuda"])
def backend(request: Any, folder: Path) -> Backend:
    return Backend(request.param, emulator.Emulator(folder), PRELUDES[request.param])


@pytest.mark.parametrize("check", [*checks.checks_of("array")], ids=lambda check: check.name)
def test_array_code_is_the_reference_within_the_rounding_of_its_type(check: Any) -> None:
    outcome = check.run()
    assert outcome.passed, outcome


@needs_compiler
@pytest.mark.parametrize("offset", [None, 0, 12345])
@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_the_kernel(backend: Backend, case: checks.Case, offset: int | None) -> None:
    """Outputs begin as NaN; the position is a number, or on the device."""
    rows, heads, norms, rope = case.arrays()
    at = case.offset if offset is None else offset
    launcher = launch.Launcher(backend, poison=float("nan"))
    truth = qk_norm_rope.reference.place(rows, heads, norms, rope, at)
    for position in (at, mx.array(at)):
        found = launcher.place(rows, heads, norms, Rotation(rope, position))
        for mine, theirs in zip(found, truth, strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, case.dtype)
            tolerance = checks.TOLERANCE[case.dtype] * (1 if at < 10_000 else 50)
            assert difference(mine, theirs) <= tolerance


@needs_compiler
def test_nothing_but_heads_is_read(backend: Backend) -> None:
    """Neither gates nor values: NaN there reaches nothing."""
    rows, heads, norms, rope = checks.CASES[1].arrays()
    launcher = launch.Launcher(backend)
    clean = launcher.place(rows, heads, norms, Rotation(rope, 3))
    column = mx.arange(rows.shape[-1])
    end, stop = heads.ends
    gate = (column < end) & (column % heads.step >= heads.size)
    spoilt = mx.where(gate | (column >= stop), float("nan"), rows)
    for mine, theirs in zip(
        launcher.place(spoilt, heads, norms, Rotation(rope, 3)), clean, strict=True
    ):
        assert mx.array_equal(mine, theirs)


def test_the_sources_use_only_builtins_that_mlx_lm_uses() -> None:
    text = source.METAL_PRELUDE + source.Variant(1e-6).source
    assert builtins_in(text) == {
        "metal::exp",
        "metal::rsqrt",
        "simd_shuffle_xor",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threadgroup_position_in_grid",
    }
    metal = qk_norm_rope.metal.BACKEND
    assert metal.build is mx.fast.metal_kernel
    assert metal.prelude == source.METAL_PRELUDE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 80}, "multiple of 32"),
        ({"size": 288}, "multiple of 32"),
        ({"dtype": mx.int32}, "dtype"),
        ({"plain": False}, "plain"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(change: dict[str, Any], reason: str) -> None:
    request = qk_norm_rope.Request(mx.bfloat16, 128, True, "gpu")
    assert launch.unsupported(request) is None
    assert reason in str(launch.unsupported(attrs.evolve(request, **change)))


class Theirs:
    """As a third party registers an implementation; counts its calls."""

    name = "test.theirs"

    def __init__(self, place: Callable[..., Any]) -> None:
        self.calls, self._place = 0, place

    def supports(self, request: Any) -> str | None:
        return launch.unsupported(attrs.evolve(request, device="gpu"))

    def place(self, *given: Any) -> Any:
        self.calls += 1
        return self._place(*given)


@pytest.mark.parametrize(
    ("norms", "rope"),
    [
        ((nn.LayerNorm(32), nn.RMSNorm(32)), nn.RoPE(32)),
        ((nn.RMSNorm(32, eps=1e-5), nn.RMSNorm(32, eps=1e-6)), nn.RoPE(32)),
        ((nn.RMSNorm(32), nn.RMSNorm(32)), nn.ALiBi()),
    ],
    ids=["another norm", "another epsilon", "another rope"],
)
def test_what_is_not_plain_is_run_by_array_code(
    norms: Any, rope: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = mx.random.normal((1, 3, 96), key=mx.random.key(1))
    rotation = Rotation(rope, 0)
    if isinstance(rope, nn.ALiBi):
        rotation = type("Other", (Rotation,), {"__call__": lambda self, x: x})(rope, 0)
    theirs = Theirs(lambda *given: pytest.fail("it does not serve this"))
    with caplog.at_level(logging.INFO, "draftloom.kernels"):
        found = qk_norm_rope.place(rows, Heads(1, 1, 32, 32), norms, rotation, use=theirs)
    assert [x.shape for x in found] == [(1, 1, 3, 32)] * 2


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kernel", ["array", pytest.param("emulated", marks=needs_compiler)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_drafter_drafts_the_same(
    name: str, kernel: str, rows: int, tmp_path: Path, folder: Path
) -> None:
    """With array code the bits are the same; the emulated kernel adds in another order."""
    checkpoint = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), head_dim=32, intermediate_size=64,
        **CONFIGS[name],
    )  # fmt: skip
    run = qk_norm_rope.array.place
    if kernel == "emulated":
        run = launch.Launcher(
            Backend("metal", emulator.Emulator(folder), source.METAL_PRELUDE), poison=float("nan")
        ).place
    theirs, target = Theirs(run), FakeTarget()
    options = {"window": 9, "sinks": 2}
    wanted = drafts(bound(checkpoint, target, "packed", **options), target, rows)
    drafter = bound(checkpoint, target, "packed", **options)
    for layer in drafter._loaded.network.layers:
        layer.self_attn.placed_by = theirs
    found = drafts(drafter, target, rows)
    assert theirs.calls == len(found) * 3
    for mine, expected in zip(found, wanted, strict=True):
        if kernel == "array":
            assert np.array_equal(mine, expected)
        else:
            assert np.abs(mine - expected).max() < 1e-4


def test_it_is_chosen_by_name() -> None:
    settings = KernelSettings.of({"qk-norm-rope": "array"})
    assert qk_norm_rope.OPERATION.wanted(settings.use("qk-norm-rope")) is None
    assert {"cuda"} == qk_norm_rope.TIMED
    assert qk_norm_rope.OPERATION.wanted("cuda") == "cuda"


@pytest.mark.parametrize("packed", [True, False])
def test_apart_there_is_nothing_for_it_to_do(
    packed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), head_dim=32, intermediate_size=64
    )
    drafter = bound(checkpoint, FakeTarget(), "attention" if packed else "off")
    theirs = Theirs(qk_norm_rope.array.place)
    place_heads(drafter._loaded.network, theirs)
    assert ("choose packed-drafter=attention too" in caplog.text) == (not packed)
    drafts(drafter, FakeTarget(), 1)
    assert (theirs.calls > 0) == packed


def test_a_position_on_the_device_is_the_same_in_a_trace() -> None:
    rope = nn.RoPE(16, base=1e6)
    traced = mx.compile(lambda at: Rotation(rope, at[:1].squeeze(0)).table(5))
    for at in (0, 7, 4000):
        found = traced(mx.full((4,), at, dtype=mx.int32))
        assert mx.allclose(found, Rotation(rope, at).table(5), atol=1e-6).item()
