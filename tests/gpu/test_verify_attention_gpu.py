"""Verify attention: the kernels on the GPU that is here (Metal or CUDA), against the reference."""

from __future__ import annotations

from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from draftloom.adapters.attention_module import AttentionModule
from draftloom.adapters.verify_attention import VerifyAttention
from draftloom.caches.fixed_length import FixedLengthEntry
from draftloom.kernels import verify_attention
from draftloom.kernels.verify_attention import cuda, metal
from draftloom.kernels.verify_attention.launch import Geometry, Launcher, tensor_geometry_for
from tests.support import models, pipelines
from tests.support.attention_cases import CASES, TOLERANCE, Case, error, poisoned, truth

pytestmark = pytest.mark.gpu

LARGE = tuple(
    Case(dtype, heads, queries, lengths, allocated, size, window, sinks)
    for dtype in TOLERANCE
    for heads, queries, lengths, allocated, size, window, sinks in (
        ((16, 4), 16, (1000,), 1024, 256, None, False),
        ((16, 4), 1, (4095,), 4096, 256, None, False),
        ((32, 8), 8, (777, 50), 1024, 128, None, False),
        ((64, 8), 16, (3000,), 3072, 64, 128, True),
        ((24, 24), 5, (300,), 512, 128, None, False),
        ((16, 2), 32, (2047,), 2048, 128, 700, False),
    )
)


@pytest.fixture
def launcher() -> Launcher:
    """The backend's launcher, with outputs that start NaN."""
    backend = metal.BACKEND if mx.metal.is_available() else cuda.BACKEND
    return Launcher(backend, poison=float("nan"))


def run(launcher: Launcher, case: Case, spoil: bool = True) -> mx.array:
    q, k, v, sinks = case.arrays()
    if spoil:
        k, v = poisoned(case, k), poisoned(case, v)
    lengths = mx.array(case.lengths)
    return launcher.attend(q, k, v, lengths, scale=case.scale, window=case.window, sinks=sinks)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_against_the_reference_with_nan_past_the_valid_keys(launcher: Launcher, case: Case) -> None:
    found = run(launcher, case)
    tolerance = max(TOLERANCE[case.dtype], 5e-6)
    assert error(found, truth(case)) < tolerance
    assert mx.array_equal(found, run(launcher, case, spoil=False))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_twice_the_same_bits(launcher: Launcher, case: Case) -> None:
    assert mx.array_equal(run(launcher, case), run(launcher, case))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("queries", [1, 4, 8, 15, 16, 32])
def test_sizes_and_queries(launcher: Launcher, dtype: mx.Dtype, size: int, queries: int) -> None:
    case = Case(dtype, (8, 2), queries, (517,), 768, size)
    assert error(run(launcher, case), truth(case)) < max(TOLERANCE[case.dtype], 5e-6)


@pytest.mark.parametrize(
    "geometry",
    [Geometry(16, 16, 2), Geometry(32, 32, 8, groups=1), Geometry(64, 64, 8), Geometry(64, 32, 8)],
    ids=lambda g: f"rows{g.rows}-keys{g.keys}-simds{g.simds}-groups{g.groups}",
)
def test_every_geometry(launcher: Launcher, geometry: Geometry) -> None:
    if geometry.threadgroup_bytes(128, 2) > launcher.backend.memory:
        pytest.skip("more threadgroup memory than there is")
    case = Case(mx.bfloat16, (12, 4), 13, (1333,), 1536, 128)
    other = Launcher(launcher.backend, geometry, poison=float("nan"))
    assert error(run(other, case), truth(case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("queries", [1, 4, 8, 16])
@pytest.mark.parametrize("groups", [1, 16])
def test_long_parts_on_tensor_cores(
    launcher: Launcher, size: int, queries: int, groups: int
) -> None:
    if launcher.backend.name != "cuda":
        pytest.skip("tensor cores are CUDA's")
    case = Case(mx.bfloat16, (12, 4), queries, (3333,), 4096, size)
    geometry = attrs.evolve(tensor_geometry_for(3 * queries, size), groups=groups)
    other = Launcher(launcher.backend, geometry, poison=float("nan"))
    assert error(run(other, case), truth(case)) < TOLERANCE[case.dtype]


def test_unaligned_buffers(launcher: Launcher) -> None:
    """Keys and values that start at an odd element: the wide loads must notice."""
    case = Case(mx.bfloat16, (4, 2), 6, (100,), 128, 64)
    q, k, v, _ = case.arrays()

    def odd(x: mx.array) -> mx.array:
        flat = mx.concatenate([mx.zeros((3,), x.dtype), x.reshape(-1)])
        mx.eval(flat)
        return flat[3:].reshape(x.shape)

    found = launcher.attend(odd(q), odd(k), odd(v), 100, scale=case.scale)
    assert mx.array_equal(found, launcher.attend(q, k, v, 100, scale=case.scale))


def test_the_array_path_of_the_device() -> None:
    for case in LARGE:
        q, k, v, sinks = case.arrays()
        found = verify_attention.attend(
            q, k, v, mx.array(case.lengths),
            scale=case.scale, window=case.window, sinks=sinks, use="array",
        )  # fmt: skip
        assert error(found, truth(case)) < 3e-2, case  # MLX sums bfloat16 so on some devices


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "llama"])
def test_inside_a_model(family: str) -> None:
    name = "metal" if mx.metal.is_available() else "cuda"

    def new() -> Any:
        return models.new(models.FAMILIES[family], head_dim=64)

    stock = new()
    with pipelines.adapter(new()) as target:
        target.attention.replace(lambda a: AttentionModule(a, VerifyAttention(name)))
        ours, theirs = target.make_cache(), make_prompt_cache(stock)
        for count in (40, 6, 1, 17):
            tokens = mx.array([[(3 + 7 * i) % models.VOCAB for i in range(count)]])
            entries = [FixedLengthEntry(e) if type(e) is KVCache else e for e in ours]
            found = target.model(tokens, cache=entries)
            expected = stock(tokens, cache=theirs)
            assert mx.allclose(found, expected, rtol=0, atol=5e-2)
