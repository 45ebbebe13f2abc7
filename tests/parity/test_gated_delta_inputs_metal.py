"""The kernels around the gated delta rule: the Metal source compiled as C++, run lane by lane.

What is compiled is the very header and body that go to ``mx.fast.metal_kernel``; see metal_shim.
"""

import re

import attrs
import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache

from draftloom.adapters.gated_delta import RecordingMixer, project_qwen3_5
from draftloom.apps.cli.doctor import kernel_choices
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import choice, gated_delta_inputs, gated_norm
from draftloom.kernels.backend import CUDA_BUILTINS, Backend
from draftloom.kernels.check import difference
from draftloom.kernels.gated_delta_inputs import checks, launch, source
from draftloom.kernels.gated_norm import checks as norm_checks
from draftloom.kernels.gated_norm import launch as norm_launch
from draftloom.kernels.gated_norm import source as norm_source
from draftloom.model_info import ModelInfo
from tests.parity.metal_shim import builtins_in, cuda_prelude, emulator, needs_compiler

pytestmark = needs_compiler

Case = checks.Case
KINDS = {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("metal")


PRELUDES = {"metal": source.METAL_PRELUDE, "cuda": cuda_prelude(source.CUDA_PRELUDE)}


@pytest.fixture(params=[("metal", 0), ("metal", 5), ("cuda", 5)], ids=lambda p: f"{p[0]}-gap{p[1]}")
def backend(request, folder):
    """The emulator; inputs lie dense, or with NaN between their rows. Of CUDA's prelude everything
    but the builtins is compiled too."""
    name, gap = request.param
    return Backend(name, emulator.Emulator(folder, gap=gap), PRELUDES[name])


def compare(found, truth, dtype):
    """Every output within its tolerance; the window is a copy."""
    of = checks.KERNEL[dtype]
    tolerances = {"q": of, "k": of, "v": of, "g": 2e-6, "beta": 2e-6, "window": 0.0}
    for name, tolerance in tolerances.items():
        mine, theirs = getattr(found, name), getattr(truth, name)
        assert mine.shape == theirs.shape, name
        assert difference(mine, theirs) <= tolerance, name
    assert {found.q.dtype, found.k.dtype, found.v.dtype, found.window.dtype} == {dtype}
    assert {found.g.dtype, found.beta.dtype} == {mx.float32}


@pytest.mark.parametrize(
    ("kind", "rows", "tokens", "heads", "sizes", "taps", "masked"),
    [
        ("bf16", 1, 1, (1, 1), (32, 32), 4, False),
        ("fp32", 2, 5, (2, 2), (64, 32), 4, False),
        ("fp16", 1, 16, (1, 4), (32, 64), 4, True),
        ("bf16", 2, 3, (2, 1), (128, 32), 4, True),
        ("fp32", 3, 2, (1, 2), (32, 96), 3, False),
        ("bf16", 1, 33, (1, 2), (256, 32), 2, True),
        ("fp16", 1, 7, (3, 1), (32, 256), 4, False),
        ("fp32", 1, 4, (16, 2), (128, 128), 4, False),
    ],
    ids=str,
)
def test_inputs(backend, kind, rows, tokens, heads, sizes, taps, masked):
    dtype = KINDS[kind]
    case = Case(dtype, rows, tokens, *heads, sizes, taps, masked)
    layer, projected, before, mask = case.arrays()
    launcher = launch.Launcher(backend, poison=float("nan"))
    found = launcher.prepare(layer, projected, before, mask)
    truth = gated_delta_inputs.reference.prepare(layer, projected, before, mask)
    compare(found, truth, dtype)


def test_nothing_before_is_zeros(backend):
    layer, projected, before, _ = Case(mx.float32, 2, 3).arrays()
    launcher = launch.Launcher(backend, poison=float("nan"))
    found = launcher.prepare(layer, projected, None)
    compare(found, launcher.prepare(layer, projected, mx.zeros_like(before)), mx.float32)


def test_nan_in_masked_tokens_reaches_no_other(backend):
    layer, projected, before, mask = Case(mx.bfloat16, 2, 9, masked=True).arrays()
    launcher = launch.Launcher(backend, poison=float("nan"))
    clean = launcher.prepare(layer, projected, before, mask)
    spoiled = [mx.where(mask[..., None], x, mx.array(float("nan"), x.dtype)) for x in projected]
    found = launcher.prepare(layer, gated_delta_inputs.Projected(*spoiled), before, mask)
    assert mx.array_equal(found.window, clean.window)
    for name in ("q", "k", "v", "g", "beta"):
        kept = mask.reshape(*mask.shape, *[1] * (getattr(clean, name).ndim - 2))
        mine, theirs = (mx.where(kept, getattr(x, name), 0.0) for x in (found, clean))
        assert mx.array_equal(mine, theirs), name


@pytest.mark.parametrize("a", [-80.0, -20.0, -3.0, 0.0, 1e-4, 15.0, 90.0])
def test_the_gates_at_the_ends_of_their_range(folder, a):
    layer, projected, before, _ = Case(mx.float32, 1, 1).arrays()
    far = attrs.evolve(layer, dt_bias=mx.array([a, -a]), a_log=mx.array([2.7, -4.0]))
    projected = projected._replace(a=mx.zeros_like(projected.a), b=mx.full((1, 1, 2), a))
    backend = Backend("metal", emulator.Emulator(folder), source.METAL_PRELUDE)
    found = launch.Launcher(backend).prepare(far, projected, before)
    truth = gated_delta_inputs.reference.prepare(far, projected, before)
    assert mx.isfinite(found.g).all().item()
    assert mx.abs(found.g - truth.g).max().item() < 2e-6
    assert mx.abs(found.beta - truth.beta).max().item() < 1e-6


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 32), (2, 5, 3, 64), (1, 16, 4, 128), (3, 2, 1, 256)], ids=str
)
def test_gated_norm(backend, kind, shape):
    dtype = KINDS[kind]
    norm, y, z = norm_checks.Case(dtype, shape).arrays()
    found = norm_launch.Launcher(backend, poison=float("nan")).normalise(norm, y, z)
    truth = gated_norm.reference.normalise(y, z, norm.weight, norm.eps)
    assert found.dtype == dtype
    assert difference(found, truth) <= checks.KERNEL[dtype]


def test_gated_norm_of_zeros_is_zero(backend):
    norm, y, z = norm_checks.Case(mx.float32, (1, 2, 2, 32)).arrays()
    found = norm_launch.Launcher(backend).normalise(norm, mx.zeros_like(y), z)
    assert not mx.any(found).item()


@pytest.mark.parametrize(
    ("variant", "module"),
    [
        (source.Variant(masked=True), gated_delta_inputs),
        (source.Variant(), gated_delta_inputs),
        (norm_source.Variant(1e-6), gated_norm),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_emulated_source_is_the_one_metal_gets(variant, module):
    seen = {}

    def build(**arguments):
        seen.update(arguments)
        return lambda **_: []

    metal = module.metal.BACKEND
    Backend("metal", build, metal.prelude).kernel(variant, (mx.float32,), (), strided=True)
    assert seen["source"] == variant.source
    assert seen["header"] == source.METAL_PRELUDE == metal.prelude
    assert seen["ensure_row_contiguous"] is False
    assert metal.build is mx.fast.metal_kernel


def test_the_sources_use_only_builtins_that_mlx_lm_uses():
    text = source.METAL_PRELUDE + source.Variant(masked=True).source
    text += norm_source.Variant(1e-6).source
    assert builtins_in(text) == {
        "metal::exp",
        "metal::rsqrt",
        "simd_shuffle_xor",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threadgroup_position_in_grid",
    }


def test_every_word_of_the_body_is_cuda_too():
    """The CUDA prelude says what Metal's words mean; both define the same functions."""
    for word in ("simd_shuffle_xor", "thread_index_in_simdgroup", "threadgroup_position_in_grid"):
        assert f"#define {word}" in source.CUDA_PRELUDE
    assert source.CUDA_PRELUDE.startswith(CUDA_BUILTINS)
    functions = re.compile(r"float (\w+)\(float x\)")
    assert functions.findall(source.CUDA_PRELUDE) == functions.findall(source.METAL_PRELUDE)


class Emulated:
    """As a third party registers an implementation: the kernel, emulated, and how often it ran."""

    name = "test.emulated"

    def __init__(self, backend, launcher, unsupported, operation):
        self.supports = lambda request: unsupported(attrs.evolve(request, device="gpu"))
        run = getattr(launcher.Launcher(backend, poison=float("nan")), operation)

        def counted(*arguments):
            self.calls += 1
            return run(*arguments)

        self.calls = 0
        setattr(self, operation, counted)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_layer_with_both_kernels_equals_the_stock_layer(folder, kind):
    """Prompt by the stock layer, then blocks that record, with the tape replayed between them."""
    config = qwen3_5.TextModelArgs(
        hidden_size=32, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=32, linear_value_head_dim=32, rms_norm_eps=1e-5,
    )  # fmt: skip
    mx.random.seed(3)
    stock = qwen3_5.GatedDeltaNet(config)
    stock.set_dtype(KINDS[kind])
    mixer = RecordingMixer(stock, project_qwen3_5)
    backend = Backend("metal", emulator.Emulator(folder, gap=3), source.METAL_PRELUDE)
    inputs = Emulated(backend, launch, launch.unsupported, "prepare")
    norm = Emulated(backend, norm_launch, norm_launch.unsupported, "normalise")
    operations = {"gated-delta-inputs": inputs, "gated-norm": norm}
    pairs = tuple((operation, one.name) for operation, one in operations.items())
    mixer.tune(KernelSettings(pairs, plugins=tuple(operations.items())))
    x = mx.random.normal((1, 20, 32)).astype(KINDS[kind])
    whole, cache = ArraysCache(2), ArraysCache(2)
    expected = stock(x, None, whole)
    found = [mixer(x[:, :6], None, cache)]
    rollback, at = TapeReplayRollback(defer=True), 6
    for tokens, keep in ((5, 3), (4, 4), (6, 2), (5, 5)):
        speculation = rollback.begin(cache, mx.zeros((1, tokens)))
        found.append(mixer(x[:, at : at + tokens], None, speculation.entry)[:, :keep])
        speculation.commit((keep - 1,))
        at += keep
    assert at == 20
    assert inputs.calls == norm.calls == 4
    tolerance = {"fp32": 2e-5, "bf16": 3e-2}[kind]
    assert difference(mx.concatenate(found, axis=1), expected) < tolerance
    assert difference(cache[1], whole[1]) < tolerance
    assert mx.array_equal(cache[0], whole[0])


def request(**changes):
    values = {
        "dtype": mx.bfloat16, "before": mx.bfloat16, "taps": 4, "biased": False,
        "key_heads": 2, "value_heads": 4, "key_size": 128, "value_size": 128, "device": "gpu",
    }  # fmt: skip
    return gated_delta_inputs.Request(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_size": 48}, "Dk = 48"),
        ({"value_size": 288}, "Dv = 288"),
        ({"dtype": mx.int32, "before": mx.int32}, "dtype"),
        ({"before": mx.float32}, "cache holds"),
        ({"taps": 9}, "9 taps"),
        ({"biased": True}, "bias"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_kernels_say_what_they_do_not_serve(changes, reason):
    assert launch.unsupported(request()) is None
    assert reason in launch.unsupported(request(**changes))


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_norm_consists_of_is_looked_at(plain, with_cuda, monkeypatch):
    norm, y, z = norm_checks.Case(mx.float32, (1, 2, 2, 32)).arrays()
    if not plain:
        norm.bias = mx.zeros((32,))
    asked = []
    operation = gated_norm.OPERATION
    monkeypatch.setattr(
        gated_norm.dispatch, "OPERATION", Asked(operation, lambda r: asked.append(r.plain))
    )
    gated_norm.normalise(norm, y, z, use="cuda")
    assert asked == [plain]


class Asked:
    """An operation that notes what it is asked, and answers with array code."""

    def __init__(self, operation, note):
        self._operation, self._note = operation, note
        self.wanted = operation.wanted

    def choose(self, request, use):
        self._note(request)
        return self._operation.choose(request, "array")


def test_a_norm_that_is_something_else_is_left_to_itself():
    ask = norm_launch.Request(mx.bfloat16, 128, True, "gpu")
    assert norm_launch.unsupported(ask) is None
    assert "RMS norm" in norm_launch.unsupported(attrs.evolve(ask, plain=False))
    assert "Dv = 40" in norm_launch.unsupported(attrs.evolve(ask, size=40))


@pytest.mark.parametrize("module", [gated_delta_inputs, gated_norm], ids=lambda m: m.OPERATION.name)
def test_by_default_no_kernel_runs_that_was_not_timed(module):
    assert frozenset({"cuda"}) == module.TIMED
    assert module.OPERATION.default() == "array"
    assert module.array.by_default()
    assert not module.cuda.by_default()
    assert not module.metal.by_default()
    with pytest.raises(ValueError, match="no implementation 'cude'"):
        module.OPERATION.choose(request(), "cude")
    refused = module.OPERATION.choose(request(device="cpu"), "cuda")
    assert refused.name == "array"
    assert refused.rejected == (("cuda", "the default device is the CPU"),)


def test_doctor_says_why_a_layer_gets_array_code():
    sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
    config = {"model_type": "qwen3_5"} | {f"linear_{k}": v for k, v in sizes.items()}
    found = {one.operation: one for one in kernel_choices(ModelInfo("x", None, config))}
    for name in ("gated-delta-inputs", "gated-norm"):
        assert found[name].kernel == "array"
        assert found[name].rejected["cuda"] == "the default device is the CPU"
    assert not [one for one in kernel_choices(ModelInfo("x", None, {})) if "gated" in one.operation]


@pytest.fixture
def with_cuda(monkeypatch):
    """As on a machine with CUDA, as far as choosing goes."""
    for module in (gated_delta_inputs, gated_norm):
        monkeypatch.setattr(module.cuda, "why_not_here", lambda: None)
    choice._choose.cache_clear()
    yield
    choice._choose.cache_clear()


def test_choices_and_reasons_on_a_gpu(with_cuda):
    choose = gated_delta_inputs.OPERATION.choose
    assert choose(request()).implementation is gated_delta_inputs.cuda.LAUNCHER
    assert dict(choose(request(key_size=48)).rejected)["cuda"].startswith("Dk = 48")
    assert choose(request(), "array").rejected == ()
    named = choose(request(), "cuda")
    assert (named.name, named.implementation) == ("cuda", gated_delta_inputs.cuda.LAUNCHER)
    refused = choose(request(key_size=48), "cuda")
    assert (refused.name, [name for name, _ in refused.rejected]) == ("array", ["cuda"])
    norm = gated_norm.OPERATION.choose(gated_norm.Request(mx.bfloat16, 128, True, "gpu"), "cuda")
    assert norm.implementation is gated_norm.cuda.LAUNCHER


def test_what_was_timed_is_what_auto_runs(with_cuda):
    """What the one constant of an operation does."""
    for timed, name in (({"cuda"}, "cuda"), ((), "array")):
        operation = attrs.evolve(gated_delta_inputs.OPERATION, timed=frozenset(timed))
        assert operation.default() == name
        assert operation.choose(request()).name == name
        assert operation.choose(request(key_size=48)).name == "array"
    assert dict(operation.choose(request()).rejected)["cuda"] == choice.UNTIMED
