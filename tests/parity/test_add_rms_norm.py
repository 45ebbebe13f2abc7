"""A residual addition and the norm behind it in one launch: the Metal source compiled as C++ and
run lane by lane, CUDA's prelude too; models and drafters whose layers add so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from draftloom.adapters.compiled_pass import CompiledPass
from draftloom.adapters.residual import KNOWN_CLASSES, ResidualLayers
from draftloom.contracts import TargetOutput
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import add_rms_norm
from draftloom.kernels.add_rms_norm import MOST_ROWS, add_norm, checks, launch, source
from draftloom.kernels.backend import Backend
from draftloom.kernels.check import difference
from tests.parity.metal_shim import builtins_in, cuda_prelude, emulator, needs_compiler
from tests.parity.test_attention_module import equal, run, tokens
from tests.parity.test_dflash import HIDDEN, VOCAB
from tests.parity.test_packed_drafter import CONFIGS, FakeTarget, bound, drafts
from tests.support import models, pipelines
from tests.support.oracle import same_caches, text_model
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
@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_the_kernel(backend: Backend, case: checks.Case) -> None:
    """Outputs begin as NaN. Sums have MLX's very bits; norms too, but where a sum of squares that
    was added up in another order rounds otherwise."""
    x, y, norm = case.arrays()
    launcher = launch.Launcher(backend, poison=float("nan"))
    total, normed = launcher.add_norm(x, y, norm)
    assert (total.dtype, normed.dtype) == (case.dtype, case.dtype)
    assert mx.array_equal(total, x + y)
    _, truth = add_rms_norm.reference.add_norm(x, y, norm)
    assert difference(normed, truth) <= checks.TOLERANCE[case.dtype]
    theirs = norm(x + y)
    if case.dtype != mx.float32:
        assert (normed != theirs).astype(mx.float32).mean().item() < 0.01


@needs_compiler
def test_slices_are_taken(backend: Backend) -> None:
    """As the rows of a block that a drafter's last layer goes on with."""
    x, y, norm = checks.CASES[1].arrays()
    wide = mx.concatenate([y, x], axis=1)
    found = launch.Launcher(backend).add_norm(wide[:, 3:], y, norm)
    for mine, theirs in zip(found, launch.Launcher(backend).add_norm(x, y, norm), strict=True):
        assert mx.array_equal(mine, theirs)


def test_the_sources_use_only_builtins_that_mlx_lm_uses() -> None:
    text = source.METAL_PRELUDE + source.Variant(1e-6).source
    assert builtins_in(text) == {
        "metal::exp",
        "metal::rsqrt",
        "simd_shuffle_xor",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threadgroup_barrier",
        "threadgroup_position_in_grid",
    }
    metal = add_rms_norm.metal.BACKEND
    assert metal.build is mx.fast.metal_kernel
    assert metal.prelude == source.METAL_PRELUDE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": launch.MOST_COLUMNS + 1}, "up to"),
        ({"size": 0}, "up to"),
        ({"dtype": mx.int32}, "dtype"),
        ({"plain": False}, "plain"),
    ],
)
def test_what_the_kernel_does_not_serve_is_said(change: dict[str, Any], reason: str) -> None:
    request = add_rms_norm.Request(mx.bfloat16, 2560, True, "gpu")
    assert launch.unsupported(request) is None
    assert reason in str(launch.unsupported(attrs.evolve(request, **change)))


class Theirs:
    """As a third party registers an implementation; counts its calls."""

    name = "test.theirs"

    def __init__(self, add: Callable[..., Any] = add_rms_norm.array.add_norm) -> None:
        self.calls, self._add = 0, add

    def supports(self, request: Any) -> str | None:
        return launch.unsupported(attrs.evolve(request, device="gpu"))

    def add_norm(self, *given: Any) -> Any:
        self.calls += 1
        return self._add(*given)


class Chosen:
    """Settings that name an implementation for this operation."""

    def __init__(self, theirs: Theirs) -> None:
        self._theirs = theirs

    def use(self, operation: str, **rest: Any) -> Any:
        return self._theirs if operation == add_rms_norm.OPERATION.name else None


def tuned(layers: Any, theirs: Theirs) -> ResidualLayers:
    found = ResidualLayers(layers)
    found.tune(cast(KernelSettings, Chosen(theirs)))
    return found


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32)], ids=["another", "half"])
def test_what_is_not_plain_is_run_by_array_code(norm: Any) -> None:
    if isinstance(norm, nn.RMSNorm):
        norm.weight = norm.weight.astype(mx.float16)
    x = mx.random.normal((1, 3, 32), key=mx.random.key(1))
    theirs = Theirs()
    total, normed = add_norm(x, x, norm, use=theirs)
    assert theirs.calls == 0
    assert mx.array_equal(total, x + x)
    assert mx.array_equal(normed, norm(x + x))


@pytest.mark.parametrize(("rows", "served"), [(MOST_ROWS, 1), (MOST_ROWS + 1, 0)])
def test_a_prompt_is_mlxs_own(rows: int, served: int) -> None:
    x, theirs = mx.ones((1, rows, 32)), Theirs()
    add_norm(x, x, nn.RMSNorm(32), use=theirs)
    assert theirs.calls == served


FAMILIES = [
    name
    for name in sorted(models.FAMILIES)
    if type(text_model(models.stock(name)).model.layers[0]) in KNOWN_CLASSES
]


def test_families_of_every_known_class_are_here() -> None:
    seen = {type(text_model(models.stock(name)).model.layers[0]) for name in FAMILIES}
    assert seen == set(KNOWN_CLASSES)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_mlx_lms_logits_and_caches(family: str, rows: int) -> None:
    """Layer by layer one addition and norm less than there are additions; taps and all."""
    stock = models.stock(family)
    with pipelines.adapter(models.build(family)) as target:
        layers = text_model(target.model).model.layers
        originals, theirs = list(layers), Theirs()
        residual = tuned(layers, theirs)
        ours, caches = make_prompt_cache(stock), make_prompt_cache(stock)
        assert equal(run(target.model, ours, rows), run(stock, caches, rows))
        assert same_caches(ours, caches)
        assert theirs.calls == 5 * (2 * len(layers) - 1)
        assert equal([target.model(tokens(4, 1))], [stock(tokens(4, 1))])  # without a cache
        target.tap((0, len(layers) - 1))
        target.forward(tokens(4, 1), target.make_cache())
        target.tap(())
        residual.restore()
        assert all(a is b for a, b in zip(layers, originals, strict=True))


@needs_compiler
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_a_model_by_the_kernel(family: str, folder: Path) -> None:
    """In float32; the emulated kernel adds squares in another order."""
    backend = Backend("metal", emulator.Emulator(folder), source.METAL_PRELUDE)
    stock = models.stock(family)
    with pipelines.adapter(models.build(family)) as target:
        theirs = Theirs(launch.Launcher(backend, poison=float("nan")).add_norm)
        residual = tuned(text_model(target.model).model.layers, theirs)
        ours = run(target.model, make_prompt_cache(stock))
        wanted = run(stock, make_prompt_cache(stock))
        residual.restore()
    assert theirs.calls > 0
    for mine, expected in zip(ours, wanted, strict=True):
        assert mx.abs(mine - expected).max().item() < 1e-4


def test_a_layer_of_another_class_leaves_all_as_they_are() -> None:
    layers = [*text_model(models.build("qwen3")).model.layers, nn.Linear(2, 2)]
    before = list(layers)
    tuned(layers, Theirs())
    assert all(a is b for a, b in zip(layers, before, strict=True))


class _Fails(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        raise ZeroDivisionError


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_what_was_left_for_a_layer_is_not_taken_for_another(family: str) -> None:
    """After a pass that failed between two layers, and with a norm that was exchanged."""
    stock, block = models.stock(family), tokens(4, 1)
    with pipelines.adapter(models.build(family)) as target:
        layers = text_model(target.model).model.layers
        residual, second = tuned(layers, Theirs()), layers[1].layer
        norm, mlp = second.input_layernorm, second.mlp
        try:
            second.mlp = _Fails()
            with pytest.raises(ZeroDivisionError):
                target.model(block)
            second.mlp = mlp
            assert equal([target.model(block)], [stock(block)])
            second.input_layernorm = nn.RMSNorm(norm.weight.shape[0], eps=1.0)
            assert not equal([target.model(block)], [stock(block)])
        finally:
            second.mlp, second.input_layernorm = mlp, norm
        assert equal([target.model(block)], [stock(block)])
        residual.restore()


def test_a_traced_pass_gives_the_same() -> None:
    stock = models.stock("qwen3_5")
    with pipelines.adapter(models.build("qwen3_5")) as target:
        theirs = Theirs()
        residual = tuned(text_model(target.model).model.layers, theirs)
        compiled = CompiledPass(target.model, "it")
        compiled.why_not = ""

        def forward(block: mx.array, cache: list[Any]) -> TargetOutput:
            return TargetOutput(target.model(block, cache=cache), None)

        ours, caches = make_prompt_cache(stock), make_prompt_cache(stock)
        assert equal([target.model(tokens(9, 1), cache=ours)], [stock(tokens(9, 1), cache=caches)])
        calls = theirs.calls
        for start in (2, 5):
            found = compiled.run(forward, tokens(3, start), ours)
            assert found is not None
            assert mx.allclose(found.logits, stock(tokens(3, start), cache=caches), atol=1e-5)
        assert theirs.calls > calls
        assert (compiled.traced, compiled.replayed) == (1, 2)
        residual.restore()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kernel", ["array", pytest.param("emulated", marks=needs_compiler)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_drafter_drafts_the_same(
    name: str, kernel: str, rows: int, tmp_path: Path, folder: Path
) -> None:
    """With array code the bits are the same."""
    checkpoint = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), head_dim=32, intermediate_size=64,
        **CONFIGS[name],
    )  # fmt: skip
    add = add_rms_norm.array.add_norm
    if kernel == "emulated":
        backend = Backend("metal", emulator.Emulator(folder), source.METAL_PRELUDE)
        add = launch.Launcher(backend, poison=float("nan")).add_norm
    theirs, target = Theirs(add), FakeTarget()
    options = {"window": 9, "sinks": 2}
    wanted = drafts(bound(checkpoint, target, "packed", **options), target, rows)
    drafter = bound(checkpoint, target, "packed", **options)
    for layer in drafter._loaded.network.layers:
        layer.added_by = theirs
    found = drafts(drafter, target, rows)
    assert theirs.calls == len(found) * 6
    for mine, expected in zip(found, wanted, strict=True):
        if kernel == "array":
            assert np.array_equal(mine, expected)
        else:
            assert np.abs(mine - expected).max() < 1e-4


def test_it_is_chosen_by_name() -> None:
    settings = KernelSettings.of({"add-rms-norm": "array"})
    assert add_rms_norm.OPERATION.wanted(settings.use("add-rms-norm")) is None
    assert add_rms_norm.OPERATION.wanted("cuda") == "cuda"
