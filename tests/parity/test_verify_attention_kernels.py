"""Verify attention: the sources that go to Metal and to CUDA, compiled as C++ and run lane by lane.

For CUDA the tensor core instruction is replaced by a function of the same fragments (cuda_words.h)
and the words for positions and barriers are the shim's; all else is the text that CUDA compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest

from draftloom.kernels.backend import CUDA_BUILTINS, Backend
from draftloom.kernels.compiled_cuda import cuda_kernel
from draftloom.kernels.verify_attention import cuda, metal
from draftloom.kernels.verify_attention.launch import (
    SIZES,
    Geometry,
    Launcher,
    chosen_geometry,
    geometry_for,
    tensor_geometry_for,
    valid_lengths,
)
from draftloom.kernels.verify_attention.prelude import (
    CUDA_FUNCTIONS,
    CUDA_PRELUDE,
    METAL_PRELUDE,
)
from draftloom.kernels.verify_attention.source import Combine, Partial
from draftloom.kernels.verify_attention.tensor import (
    CUDA_INSTRUCTIONS,
    CUDA_MMA,
    CUDA_TENSOR,
    TensorPartial,
)
from tests.parity.metal_shim import builtins_in, emulator, needs_compiler
from tests.support.attention_cases import CASES, TOLERANCE, Case, error, poisoned, truth

pytestmark = needs_compiler

WORDS = '#include "cuda_words.h"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attention")


def some_slow(cases: Sequence[Case], *slow: int) -> list[Any]:
    """Every kernel is compiled for a second: some cases are left to the whole suite."""
    marks = [(pytest.mark.slow,) if i in slow else () for i in range(len(cases))]
    return [
        pytest.param(case, id=str(case), marks=mark)
        for case, mark in zip(cases, marks, strict=True)
    ]


def launcher_for(name: str, folder: Path, geometry: Geometry | None = None) -> Launcher:
    """The package's own launcher on the emulator; outputs start NaN."""
    memory = {"metal": metal, "cuda": cuda}[name].BACKEND.memory
    prelude = METAL_PRELUDE if name == "metal" else WORDS + CUDA_FUNCTIONS + CUDA_TENSOR
    backend = Backend(name, emulator.Emulator(folder, memory), prelude, memory)
    return Launcher(backend, geometry, poison=float("nan"))


@pytest.fixture(params=["metal", "cuda"])
def launcher(request: pytest.FixtureRequest, folder: Path) -> Launcher:
    return launcher_for(request.param, folder)


def run(launcher: Launcher, case: Case, spoil: bool = True) -> mx.array:
    q, k, v, sinks = case.arrays()
    if spoil:
        k, v = poisoned(case, k), poisoned(case, v)
    lengths = case.lengths[0] if len(case.lengths) == 1 else mx.array(case.lengths)
    return launcher.attend(q, k, v, lengths, scale=case.scale, window=case.window, sinks=sinks)


@pytest.mark.parametrize("case", some_slow(CASES, 1, 4, 8))
def test_against_the_reference_with_nan_past_the_valid_keys(launcher: Launcher, case: Case) -> None:
    found = run(launcher, case)
    assert found.dtype == case.dtype
    assert found.shape == truth(case).shape
    assert error(found, truth(case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", ["metal", "cuda"])
@pytest.mark.parametrize("case", some_slow([CASES[i] for i in (3, 4, 5, 7)], 1, 3))
def test_one_part_of_many_tiles(folder: Path, name: str, case: Case) -> None:
    """A few keys are cut into parts of one tile; long contexts are not."""
    backend = launcher_for(name, folder).backend
    rows = case.heads[0] // case.heads[1] * case.queries
    geometry = attrs.evolve(chosen_geometry(backend, case.dtype, rows, case.size), groups=1)
    found = run(launcher_for(name, folder, geometry), case)
    assert error(found, truth(case)) < TOLERANCE[case.dtype]


def test_what_lies_past_the_valid_keys_changes_no_bit(launcher: Launcher) -> None:
    case = CASES[3]
    assert mx.array_equal(run(launcher, case), run(launcher, case, spoil=False))


def test_unaligned_buffers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's wide loads must notice; the emulator puts its guards so that no buffer is aligned."""
    aligned = run(launcher_for("cuda", folder), CASES[3])
    monkeypatch.setattr(emulator, "_GUARD", 62)
    assert mx.array_equal(run(launcher_for("cuda", folder), CASES[3]), aligned)


def test_nan_among_the_valid_keys_is_not_hidden(launcher: Launcher) -> None:
    q, k, v, _ = CASES[2].arrays()
    spoiled = mx.where(mx.arange(64)[:, None] == 40, mx.array(float("nan")), k)
    found = launcher.attend(q, spoiled, v, 41, scale=1.0)
    assert mx.isnan(found[:, :, -1]).all().item()  # the last query sees key 40
    assert not mx.isnan(found[:, :, :-1]).any().item()


def test_a_block_gives_the_rows_of_single_steps(launcher: Launcher) -> None:
    """Within rounding: the keys are cut elsewhere."""
    q, k, v, _ = CASES[2].arrays()
    block = launcher.attend(q, k, v, 41, scale=0.1)
    for i in range(5):
        step = launcher.attend(q[:, :, i : i + 1], k, v, 37 + i, scale=0.1)
        assert mx.allclose(step, block[:, :, i : i + 1], rtol=0, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros(launcher: Launcher) -> None:
    q, k, v, _ = CASES[2].arrays()
    found = launcher.attend(q, k, v, mx.array([2]), scale=1.0)
    assert mx.array_equal(found[:, :, :3], mx.zeros((1, 4, 3, 64)))
    assert (mx.abs(found[:, :, 3:]).sum(axis=-1) > 0).all().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(16, 32, 2, tensor=True),
        Geometry(32, 64, 4, groups=1, tensor=True),
        Geometry(64, 96, 8, groups=2, tensor=True, least=2),
    ],
    ids=lambda g: f"rows{g.rows}-keys{g.keys}-groups{g.groups}",
)
def test_every_geometry_on_tensor_cores(folder: Path, geometry: Geometry) -> None:
    case = Case(mx.bfloat16, (3, 1), 11, (133,), 160, 64)
    found = run(launcher_for("cuda", folder, geometry), case)
    assert error(found, truth(case)) < TOLERANCE[mx.bfloat16]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_float32_and_metal_keep_the_body_without_tensor_cores(dtype: mx.Dtype) -> None:
    sent: list[str] = []

    def build(**arguments: str) -> Any:
        sent.append(arguments["name"])
        return lambda **launch: [
            mx.zeros(shape, dtype)
            for shape, dtype in zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
        ]

    for name in ("metal", "cuda"):
        for own in (dtype, mx.float32):
            x = mx.zeros((1, 1, 40, 64), own)
            Launcher(Backend(name, build, "")).attend(x[:, :, :2], x, x, 40, scale=1.0)
    assert ["tensor" in name for name in sent[::2]] == [False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metal", "cuda"])
@pytest.mark.parametrize(
    "geometry",
    [Geometry(16, 16, 2), Geometry(32, 32, 4, groups=1), Geometry(64, 64, 8), Geometry(32, 16, 4)],
    ids=lambda g: f"rows{g.rows}-keys{g.keys}-simds{g.simds}-groups{g.groups}",
)
def test_every_geometry(folder: Path, name: str, geometry: Geometry) -> None:
    case = Case(mx.bfloat16, (3, 1), 11, (133,), 160, 64)
    found = run(launcher_for(name, folder, geometry), case)
    assert error(found, truth(case)) < TOLERANCE[mx.bfloat16]


@pytest.mark.parametrize("size", SIZES)
def test_the_geometry_on_tensor_cores_fits_memory_and_sizes(size: int) -> None:
    for rows in (1, 16, 17, 33, 64, 65, 256):
        chosen = tensor_geometry_for(rows, size)
        assert chosen.tensor
        assert chosen.threadgroup_bytes(size, 2) <= cuda.BACKEND.memory
        assert chosen.simds * 8 == chosen.rows >= min(rows, 64)
        assert chosen.keys % 32 == 0
        half = 32 * chosen.simds // 2
        assert half % (size // 8) == 0 or (size // 8) % half == 0
        assert chosen.keys // 2 * (size // 8) % half == 0


@pytest.mark.parametrize("backend", [metal.BACKEND, cuda.BACKEND], ids=lambda b: b.name)
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_the_chosen_geometry_fits_memory_and_sizes(size: int, item: int, backend: Backend) -> None:
    for rows in (1, 16, 17, 33, 64, 65, 256):
        chosen = geometry_for(rows, size, item, backend.memory)
        sharing = chosen.simds * 16 // chosen.rows
        assert chosen.threadgroup_bytes(size, item) <= backend.memory
        assert chosen.simds * 16 % chosen.rows == 0
        assert chosen.keys // 8 % sharing == 0
        assert size // 8 % sharing == 0
        assert chosen.rows >= min(rows, 64)


def test_the_keys_are_split_for_a_whole_device() -> None:
    chosen = tensor_geometry_for(64, 256)
    assert chosen.splits(4, 64) == 33  # 132 threadgroups
    assert chosen.splits(4, 128) == 16  # two of them for every part of the keys
    assert chosen.splits(1, 64) == 64
    assert chosen.splits(500, 64) == 1


def test_the_emulated_sources_are_the_ones_that_are_sent() -> None:
    assert metal.BACKEND.prelude == METAL_PRELUDE
    assert metal.BACKEND.build is mx.fast.metal_kernel
    assert cuda.BACKEND.prelude == CUDA_PRELUDE
    told = CUDA_BUILTINS + CUDA_MMA + CUDA_INSTRUCTIONS
    assert told + CUDA_FUNCTIONS + CUDA_TENSOR == CUDA_PRELUDE
    assert cuda.BACKEND.build is cuda_kernel
    assert (CUDA_MMA + CUDA_INSTRUCTIONS).count("asm") == 8
    assert "asm" not in CUDA_FUNCTIONS + CUDA_TENSOR + TensorPartial(1.0).source
    sent: dict[str, str] = {}

    def build(**arguments: str) -> object:
        sent.update(arguments)
        return lambda **_: []

    Backend("metal", build, METAL_PRELUDE).kernel(Partial(0.125), (mx.float32,), ())
    assert (sent["header"], sent["source"]) == (METAL_PRELUDE, Partial(0.125).source)
    assert "1.250000000e-01f" in sent["source"]
    bodies = [Partial(0.1), TensorPartial(0.1), Combine(True), Combine()]
    assert not any("@" in body.source for body in bodies)


def test_the_source_uses_only_builtins_that_mlx_lm_uses() -> None:
    text = METAL_PRELUDE + Partial(1.0).source + Combine(True).source
    used = builtins_in(text)
    assert used - {"thread_id"} == {
        "metal::exp",
        "simd_shuffle_xor",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threadgroup_barrier",
        "threadgroup_position_in_grid",
    }


def test_lengths_as_the_kernels_want_them() -> None:
    assert valid_lengths(41, 1).tolist() == [41] * 4
    assert valid_lengths(mx.array([3, 2]), 2).tolist() == [3, 2, 0, 0]
    long = mx.array([1, 2, 3, 4, 5], dtype=mx.int32)
    assert valid_lengths(long, 5) is long
