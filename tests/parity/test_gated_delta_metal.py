"""Gated delta rule: the Metal source, compiled as C++ and run lane by lane on the CPU.

What is compiled is the very header and body that go to ``mx.fast.metal_kernel``; see metal_shim.
"""

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest

from draftloom.kernels.gated_delta import cuda, metal, reference
from draftloom.kernels.gated_delta.launch import Backend, Geometry, Launcher, geometry_for
from draftloom.kernels.gated_delta.source import CUDA_PRELUDE, METAL_PRELUDE, Variant
from tests.parity.metal_shim import builtins_in, emulator, needs_compiler

pytestmark = needs_compiler

TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
STATE_TOLERANCE = 2e-6
KINDS = {"fp32": mx.float32, "fp16": mx.float16, "bf16": mx.bfloat16}


def load(name):
    """A module of this folder (tests are imported one by one, without their folder on the path)."""
    path = Path(__file__).parent / name
    spec = importlib.util.spec_from_file_location(f"gated_delta_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = load("test_gated_delta.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("metal")


@pytest.fixture
def launcher(folder):
    """The package's own launcher on the emulator; outputs start NaN."""
    backend = Backend("metal", emulator.Emulator(folder), METAL_PRELUDE)
    return Launcher(backend, poison=float("nan"))


@pytest.mark.parametrize(
    ("tokens", "kind", "sharing", "sizes", "masked"),
    [
        (1, "bf16", 1, (32, 32), False),
        (5, "fp32", 2, (64, 32), False),
        (16, "fp16", 4, (32, 32), True),
        (16, "bf16", 1, (128, 32), False),
        (63, "bf16", 2, (64, 64), True),
        (63, "fp32", 1, (96, 32), False),
        (5, "bf16", 2, (256, 32), True),
    ],
    ids=str,
)
def test_verify_replay_and_both_at_once(launcher, tokens, kind, sharing, sizes, masked):
    dtype = KINDS[kind]
    *block, state = shared.case(tokens, dtype, sharing=sharing, sizes=sizes, key_heads=1)
    mask = shared.mask_for(2, tokens, masked)
    truth = reference.run(*block, state, mask)
    y, tape, end = launcher.verify(*block, state, mask)
    assert shared.error(y, truth.y) < TOLERANCE[dtype]
    assert shared.error(tape.delta, truth.tape.delta) < STATE_TOLERANCE
    assert shared.error(end, truth.states[:, -1]) < STATE_TOLERANCE

    counts = mx.array([tokens // 2, tokens])
    replayed = launcher.replay(state, tape, counts)
    assert shared.error(replayed[0], truth.states[0, tokens // 2]) < STATE_TOLERANCE
    assert shared.same(replayed[1], end[1])

    fused_y, fused, middle, _ = launcher.replay_verify(tape, counts, tuple(block), state, mask)
    again_y, again, _ = launcher.verify(*block, replayed, mask)
    assert shared.same(middle, replayed)
    assert shared.same(fused_y, again_y)
    assert shared.same(fused.delta, again.delta)


def test_replay_equals_a_shorter_verify_bit_for_bit(launcher):
    *block, state = shared.case(18, mx.bfloat16, rows=1, key_heads=1, sizes=(64, 32))
    _, tape, _ = launcher.verify(*block, state)
    for n in (0, 1, 16, 17):
        replayed = launcher.replay(state, tape, n)
        stopped = launcher.verify(*[x[:, :n] for x in block], state)[2] if n else state
        assert shared.same(replayed, stopped), n


def test_counts_outside_the_tape_are_cut(launcher):
    *block, state = shared.case(3, key_heads=1, sharing=1, sizes=(32, 32))
    _, tape, end = launcher.verify(*block, state)
    cut = launcher.replay(state, tape, mx.array([-4, 99]))
    assert shared.same(cut[0], state[0])
    assert shared.same(cut[1], end[1])


def test_prefill_is_verify_in_any_split(launcher):
    *block, state = shared.case(37, mx.bfloat16, rows=1, key_heads=1, sizes=(32, 32))
    y, end = launcher.prefill(*block, state)
    parts, now = [], state
    for start, stop in ((0, 20), (20, 21), (21, 37)):
        part, _, now = launcher.verify(*[x[:, start:stop] for x in block], now)
        parts.append(part)
    assert shared.same(mx.concatenate(parts, axis=1), y)
    assert shared.same(now, end)


def test_nan_in_masked_tokens_reaches_nothing(launcher):
    *block, state = shared.case(6, mx.bfloat16, rows=2, key_heads=1, sizes=(32, 32))
    mask = shared.mask_for(2, 6, True)
    clean_y, clean, clean_end = launcher.verify(*block, state, mask)
    hole = mask[:, :, None, None]
    spoiled = [mx.where(hole, x, mx.array(float("nan"), x.dtype)) for x in block[:3]]
    spoiled += [mx.where(mask[..., None], x, mx.array(float("nan"), x.dtype)) for x in block[3:]]
    y, tape, end = launcher.verify(*spoiled, state, mask)
    assert shared.same(y, clean_y)
    assert shared.same(end, clean_end)
    assert shared.same(launcher.replay(state, tape, 6), launcher.replay(state, clean, 6))


@pytest.mark.parametrize(
    "geometry",
    [Geometry(4, 1, 2, 16), Geometry(8, 2, 2, 8), Geometry(16, 2, 4, 16), Geometry(32, 4, 4, 16)],
    ids=lambda g: f"lanes{g.lanes}-rows{g.rows}-simds{g.simds}-tile{g.tile}",
)
def test_every_geometry(launcher, geometry):
    *block, state = shared.case(19, mx.bfloat16, rows=1, key_heads=1, sizes=(128, 32))
    other = Launcher(launcher.backend, geometry, poison=float("nan"))
    truth = reference.run(*block, state)
    y, tape, end = other.verify(*block, state)
    assert shared.error(y, truth.y) < TOLERANCE[mx.bfloat16]
    assert shared.error(end, truth.states[:, -1]) < STATE_TOLERANCE
    assert shared.same(other.replay(state, tape, 19), end)


def test_the_geometry_that_cuda_uses(folder):
    """Its prelude needs a GPU, but its tiles can be walked here."""
    memory = cuda.BACKEND.memory
    backend = Backend("cuda", emulator.Emulator(folder, memory), METAL_PRELUDE, memory)
    wide = Launcher(backend, poison=float("nan"))
    narrow = Launcher(backend, Geometry(tile=16), poison=float("nan"))
    *block, state = shared.case(70, mx.bfloat16, rows=1, key_heads=1, sizes=(128, 32))
    truth = reference.run(*block, state)
    y, tape, end = wide.verify(*block, state)
    assert shared.error(y, truth.y) < TOLERANCE[mx.bfloat16]
    assert shared.error(end, truth.states[:, -1]) < STATE_TOLERANCE
    assert shared.same(wide.replay(state, tape, 70), end)
    assert shared.same(wide.replay(state, tape, 33), narrow.replay(state, tape, 33))
    assert shared.same(narrow.verify(*block, state)[2], end)


@pytest.mark.parametrize("size", range(32, 257, 32))
@pytest.mark.parametrize("backend", [metal.BACKEND, cuda.BACKEND], ids=lambda b: b.name)
def test_the_chosen_geometry_fits_memory_and_sizes(backend, size):
    chosen = geometry_for(size, backend.memory)
    assert chosen.threadgroup_bytes(size) <= backend.memory
    assert size % (4 * chosen.lanes) == 0
    assert 32 % chosen.threadgroup_rows == 0
    assert chosen.tile <= 32 * chosen.simds
    assert chosen.lanes == geometry_for(32, metal.BACKEND.memory).lanes


def test_the_emulated_source_is_the_one_metal_gets():
    variant = Variant(replay=True, block=True, tape=True, masked=True, middle=True, end=True)
    seen = {}

    def build(**arguments):
        seen.update(arguments)
        return lambda **_: []

    Backend("metal", build, metal.BACKEND.prelude).kernel(variant, (mx.float32,), ())
    assert seen["source"] == variant.source
    assert seen["header"] == METAL_PRELUDE == metal.BACKEND.prelude
    assert metal.BACKEND.build is mx.fast.metal_kernel
    assert CUDA_PRELUDE not in seen["header"]


def test_the_source_uses_only_builtins_that_mlx_lm_uses():
    variant = Variant(replay=True, block=True, tape=True, masked=True, middle=True, end=True)
    text = METAL_PRELUDE + variant.source
    used = builtins_in(text)
    assert used - {"thread_id"} == {
        "simd_shuffle_xor",
        "simdgroup_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "threadgroup_barrier",
        "threadgroup_position_in_grid",
    }


BIG = "uint i = thread_index_in_simdgroup; big[int(x[i]) * 280] = x[i]; out[i] = big[int(x[i])];"


def small(source, outputs=32):
    """Run a body of one simdgroup on the emulator."""

    def run(path):
        kernel = emulator.Emulator(path)(
            name="small", input_names=["x"], output_names=["out"], source=source
        )
        return kernel(
            inputs=[mx.arange(32).astype(mx.float32)],
            output_shapes=[(outputs,)],
            output_dtypes=[mx.float32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )[0]

    return run


def test_the_emulator_runs_simd_operations(folder):
    lane = "uint lane = thread_index_in_simdgroup;"
    total = small(f"{lane} out[lane] = simd_sum(x[lane]) + simd_max(x[lane]);")(folder)
    assert total.tolist() == [496.0 + 31.0] * 32
    swapped = small(f"{lane} out[lane] = simd_shuffle_xor(x[lane], 1);")(folder)
    assert swapped.tolist() == [float(i ^ 1) for i in range(32)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("if (thread_index_in_simdgroup < 7) simd_sum(x[0]);", "never reach"),
        ("if (thread_index_in_simdgroup < 7) simd_sum(x[0]); else simd_max(x[0]);", "different"),
        ("if (thread_index_in_simdgroup == 0) out[32] = 1;", "outside output"),
        ("threadgroup float big[9000]; " + BIG, "threadgroup memory"),
    ],
    ids=["divergent", "mixed", "out-of-bounds", "too-much-memory"],
)
def test_the_emulator_catches_what_a_gpu_would_not_forgive(folder, source, message):
    with pytest.raises(emulator.EmulationError, match=message):
        small(source)(folder)


def test_stale_threadgroup_memory_is_nan(folder):
    body = "threadgroup float held[32]; uint i = thread_index_in_simdgroup; out[i] = held[i];"
    assert mx.isnan(small(body)(folder)).all().item()
