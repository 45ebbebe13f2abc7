"""Products of few rows: the kernel's source, compiled as C++ and run lane by lane; the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from draftloom.adapters.few_rows import FewRows
from draftloom.adapters.packed import PackedModel
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import few_rows
from draftloom.kernels.backend import Backend
from draftloom.kernels.few_rows import array, cuda, dispatch, reference
from draftloom.kernels.few_rows.checks import CASES, TOLERANCE, Case, checks_of
from draftloom.kernels.few_rows.launch import Geometry, Launcher, Request, unsupported
from draftloom.kernels.few_rows.source import Product
from tests.parity.metal_shim import emulator, needs_compiler

WORDS = """
#include "cuda_words.h"
template <typename T>
inline T __ldcs(const T* from) { return *from; }
template <typename T>
inline T __ldg(const T* from) { return *from; }
"""


def launcher_for(folder: Path, geometry: Geometry | None = None) -> Launcher:
    """The package's own launcher on the emulator; outputs start NaN."""
    memory = cuda.BACKEND.memory
    backend = Backend("cuda", emulator.Emulator(folder, memory), WORDS, memory)
    return Launcher(backend, geometry, poison=float("nan"))


def error(found: mx.array, expected: mx.array) -> float:
    gap = mx.abs(found.astype(mx.float32) - expected).max() / mx.abs(expected).max()
    return float(gap.item())


@needs_compiler
@pytest.mark.parametrize(
    ("case", "geometry"),
    [
        (Case(mx.bfloat16, 16, 48, 352), None),
        (Case(mx.bfloat16, 3, 32, 96), Geometry(2, 2, 2)),
        (Case(mx.float16, 23, 16, 64), Geometry(1, 4, 1)),
    ],
    ids=str,
)
def test_the_source_lane_by_lane(tmp_path: Path, case: Case, geometry: Geometry | None) -> None:
    x, weight = case.arrays()
    found = launcher_for(tmp_path, geometry).product(x, weight)
    assert found.shape == (1, case.rows, case.outputs)
    assert found.dtype == case.dtype
    assert error(found, reference.product(x, weight)) < TOLERANCE[case.dtype]


@needs_compiler
def test_rows_of_all_leading_dimensions_count(tmp_path: Path) -> None:
    x, weight = Case(mx.bfloat16, 6, 16, 64).arrays()
    launcher, whole = launcher_for(tmp_path), reference.product(x, weight)
    for shape in ((6,), (2, 3), (1, 2, 3)):
        found = launcher.product(x.reshape(*shape, 64), weight)
        assert found.shape == (*shape, 16)
        assert error(found.reshape(1, 6, 16), whole) < TOLERANCE[mx.bfloat16]


def test_the_number_of_rows_is_no_part_of_the_kernel() -> None:
    assert Product(3).source == Product(3).source
    assert "x_shape[0] * x_shape[1];" in Product(3).source
    assert "const int M = x_shape[0];" in Product(2).source


@pytest.mark.parametrize("check", tuple(checks_of("array")), ids=lambda check: check.name)
def test_array_code_against_the_reference(check: Any) -> None:
    assert check.run().passed


def test_what_the_kernel_does_not_take() -> None:
    served = Request(mx.bfloat16, 16, 48, 64, "gpu")
    assert unsupported(served) is None
    for change, word in (
        ({"dtype": mx.float32}, "float32"),
        ({"rows": 33}, "33 rows"),
        ({"size": 40}, "D = 40"),
        ({"outputs": 24}, "N = 24"),
    ):
        assert word in (unsupported(attrs.evolve(served, **change)) or "")
    assert cuda.supports(attrs.evolve(served, device="cpu")) is not None


def test_nothing_is_taken_by_itself_here() -> None:
    assert array.by_default()
    assert not cuda.by_default()
    assert not few_rows.OPERATION.wanted(None)
    assert not few_rows.OPERATION.wanted("array")


class Own:
    """A third party's product, which counts."""

    name = "own"

    def __init__(self) -> None:
        self.calls = 0

    def supports(self, request: Request) -> str | None:
        return None

    def product(self, x: mx.array, weight: mx.array) -> mx.array:
        self.calls += 1
        return array.product(x, weight)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32, bias=False)
        self.biased = nn.Linear(32, 32, bias=True)
        self.embed_tokens = nn.Embedding(40, 32)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.biased(self.first(self.embed_tokens(tokens)))
        return self.embed_tokens.as_linear(x)


def test_layers_are_exchanged_and_put_back() -> None:
    model, own = Held(), Own()
    model.set_dtype(mx.bfloat16)
    tokens = mx.array([[1, 2, 3]])
    expected, names = model(tokens), [name for name, _ in tree_flatten(model.parameters())]
    before = dict(model)
    few = FewRows(model, PackedModel(model))
    settings = KernelSettings((("few-rows", "own"),), (("few-rows", own),))
    few.tune(settings)
    assert mx.array_equal(model(tokens), expected)
    assert own.calls == 2  # one layer and the head; the one with a bias is left alone
    model(mx.array([[1]]))
    assert own.calls == 2  # a single row is MLX's
    assert model.first.weight is before["first"].weight
    few.tune(KernelSettings())
    assert all(model[name] is before[name] for name in before)
    assert [name for name, _ in tree_flatten(model.parameters())] == names


def test_an_unknown_implementation_is_refused() -> None:
    x = mx.zeros((1, 4, 32))
    with pytest.raises(ValueError, match="no implementation 'curda'"):
        dispatch.product(x, mx.zeros((16, 32)), use="curda")


def test_cases_reach_both_geometries() -> None:
    from draftloom.kernels.few_rows.launch import geometry_for

    assert {geometry_for(case.outputs).tiles for case in CASES} == {1, 2}
