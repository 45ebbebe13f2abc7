"""Gated delta rule: the kernels on the GPU that is here (Metal or CUDA), against the reference."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import pytest

from draftloom.kernels import gated_delta
from draftloom.kernels.gated_delta import chunked, cuda, metal, reference
from draftloom.kernels.gated_delta.launch import Launcher

pytestmark = pytest.mark.gpu

TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
STATE_TOLERANCE = 5e-6
CHUNKED_TOLERANCE = 1e-2  # CUDA multiplies float32 matrices in TF32 unless told otherwise
KINDS = [
    pytest.param(mx.float32, id="fp32"),
    pytest.param(mx.float16, id="fp16"),
    pytest.param(mx.bfloat16, id="bf16"),
]


def load(path):
    """A test module by path (tests are imported one by one, without their folder on the path)."""
    spec = importlib.util.spec_from_file_location("gated_delta_shared", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared = load(Path(__file__).parents[1] / "parity" / "test_gated_delta.py")


@pytest.fixture
def launcher():
    """The backend's launcher, with outputs that start NaN."""
    backend = metal.BACKEND if mx.metal.is_available() else cuda.BACKEND
    return Launcher(backend, poison=float("nan"))


def truth_for(block, state, mask=None):
    """The reference, on the CPU."""
    with mx.stream(mx.cpu):
        truth = reference.run(*block, state, mask)
        mx.eval(truth.y, truth.states, truth.tape.delta)
    return truth


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("sharing", [1, 2, 4], ids=["Hv=Hk", "Hv=2Hk", "Hv=4Hk"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 63], ids=lambda t: f"T{t}")
@pytest.mark.parametrize("dtype", KINDS)
def test_verify_replay_and_both_at_once(launcher, dtype, tokens, sharing, masked):
    *block, state = shared.case(tokens, dtype, sharing=sharing, sizes=(128, 64))
    mask = shared.mask_for(2, tokens, masked)
    truth = truth_for(block, state, mask)
    y, tape, end = launcher.verify(*block, state, mask)
    assert shared.error(y, truth.y) < TOLERANCE[dtype]
    assert shared.error(tape.delta, truth.tape.delta) < STATE_TOLERANCE
    assert shared.error(end, truth.states[:, -1]) < STATE_TOLERANCE
    counts = mx.array([tokens // 2, tokens])
    replayed = launcher.replay(state, tape, counts)
    assert shared.error(replayed[0], truth.states[0, tokens // 2]) < STATE_TOLERANCE
    assert shared.same(replayed[1], end[1])
    fused_y, fused, middle, after = launcher.replay_verify(
        tape, counts, tuple(block), state, mask, write_state=True
    )
    again_y, again, again_end = launcher.verify(*block, replayed, mask)
    assert shared.same(middle, replayed)
    assert shared.same(fused_y, again_y)
    assert shared.same(fused.delta, again.delta)
    assert shared.same(after, again_end)


@pytest.mark.parametrize("sizes", [(32, 32), (96, 160), (192, 128), (256, 256)], ids=str)
def test_sizes(launcher, sizes):
    *block, state = shared.case(21, mx.bfloat16, sizes=sizes)
    truth = truth_for(block, state)
    y, tape, end = launcher.verify(*block, state)
    assert shared.error(y, truth.y) < TOLERANCE[mx.bfloat16]
    assert shared.error(end, truth.states[:, -1]) < STATE_TOLERANCE
    assert shared.same(launcher.replay(state, tape, 21), end)


@pytest.mark.parametrize("dtype", KINDS)
def test_replay_equals_a_shorter_verify_bit_for_bit(launcher, dtype):
    *block, state = shared.case(35, dtype, rows=1, sizes=(128, 128))
    _, tape, _ = launcher.verify(*block, state)
    for n in range(1, 36):
        stopped = launcher.verify(*[x[:, :n] for x in block], state)[2]
        assert shared.same(launcher.replay(state, tape, n), stopped), n


def test_prefill_is_verify_in_any_split(launcher):
    *block, state = shared.case(300, mx.bfloat16, rows=1, sizes=(128, 128))
    y, end = launcher.prefill(*block, state)
    parts, now = [], state
    for start, stop in ((0, 100), (100, 101), (101, 300)):
        part, _, now = launcher.verify(*[x[:, start:stop] for x in block], now)
        parts.append(part)
    assert shared.same(mx.concatenate(parts, axis=1), y)
    assert shared.same(now, end)


def test_unaligned_slices_are_read_correctly(launcher):
    """Rows of one packed, oddly offset buffer: the wide loads must notice."""
    q, k, v, g, beta, state = shared.case(1, mx.bfloat16, rows=1, sizes=(64, 32))
    flat = mx.concatenate([mx.zeros((3,), mx.bfloat16), *(x.reshape(-1) for x in (q, k, v))])
    cuts = [3, 3 + q.size, 3 + q.size + k.size]
    odd = [flat[at : at + x.size].reshape(x.shape) for at, x in zip(cuts, (q, k, v), strict=True)]
    expected = launcher.verify(q, k, v, g, beta, state)
    found = launcher.verify(*odd, g, beta, state)
    assert shared.same(found[0], expected[0])
    assert shared.same(found[2], expected[2])


@pytest.mark.parametrize("dtype", KINDS)
def test_chunked_rule(dtype):
    *block, state = shared.case(200, dtype, sizes=(64, 64))
    truth = truth_for(block, state)
    y, end = chunked.prefill(*block, state)
    assert shared.error(y, truth.y) < CHUNKED_TOLERANCE
    assert shared.error(end, truth.states[:, -1]) < CHUNKED_TOLERANCE


def test_the_kernel_is_chosen_here():
    *block, state = shared.case(5, mx.bfloat16, sizes=(64, 64))
    y, tape, end = gated_delta.verify(*block, state)
    expected = "metal" if mx.metal.is_available() else "cuda"
    named = gated_delta.verify(*block, state, use=expected)
    assert shared.same(y, named[0])
    assert shared.same(end, named[2])
    assert shared.same(gated_delta.replay(state, tape, 5), end)


def test_a_size_without_a_kernel_falls_back():
    *block, state = shared.case(5, sizes=(48, 64))
    truth = truth_for(block, state)
    y, _, end = gated_delta.verify(*block, state)
    assert shared.error(y, truth.y) < 1e-5
    assert shared.error(end, truth.states[:, -1]) < 1e-5
