"""The kernels around the gated delta rule, on the GPU that is here (Metal or CUDA)."""

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache

from draftloom.adapters.gated_delta import RecordingMixer, project_qwen3_5
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import gated_delta, gated_delta_inputs, gated_norm
from draftloom.kernels.check import difference
from draftloom.kernels.gated_delta_inputs import checks
from draftloom.kernels.gated_delta_inputs.launch import Launcher
from draftloom.kernels.gated_norm import checks as norm_checks
from draftloom.kernels.gated_norm.launch import Launcher as NormLauncher

pytestmark = pytest.mark.gpu

NAME = "metal" if mx.metal.is_available() else "cuda"


def on_cpu(run):
    """What a reference gives, computed on the CPU."""
    with mx.stream(mx.cpu):
        truth = run()
        mx.eval(truth)
    return truth


@pytest.mark.parametrize("case", checks.CASES, ids=str)
def test_inputs(case):
    """Outputs begin as NaN. A sliced case is read where it lies."""
    arrays = case.arrays()
    truth = on_cpu(lambda: gated_delta_inputs.reference.prepare(*arrays))
    launcher = Launcher(getattr(gated_delta_inputs, NAME).BACKEND, poison=float("nan"))
    found = launcher.prepare(*arrays)
    of = checks.KERNEL[case.dtype]
    tolerances = (of, of, of, 5e-6, 5e-6, 0.0)
    for name, mine, theirs, tolerance in zip(found._fields, found, truth, tolerances, strict=True):
        assert difference(mine, theirs) <= tolerance, name


@pytest.mark.parametrize("case", norm_checks.CASES, ids=str)
def test_gated_norm(case):
    norm, y, z = case.arrays()
    truth = on_cpu(lambda: gated_norm.reference.normalise(y, z, norm.weight, norm.eps))
    launcher = NormLauncher(getattr(gated_norm, NAME).BACKEND, poison=float("nan"))
    assert difference(launcher.normalise(norm, y, z), truth) <= checks.KERNEL[case.dtype]


@pytest.mark.parametrize("defer", [False, True], ids=["commit-replays", "deferred"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["fp32", "bf16"])
def test_a_layer_with_every_kernel(dtype, defer):
    """Blocks and commits, against the stock layer over the whole text."""
    config = qwen3_5.TextModelArgs(
        hidden_size=256, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=128, linear_value_head_dim=128, rms_norm_eps=1e-6,
    )  # fmt: skip
    mx.random.seed(3)
    stock = qwen3_5.GatedDeltaNet(config)
    stock.set_dtype(dtype)
    mixer = RecordingMixer(stock, project_qwen3_5)
    mixer.tune(KernelSettings.of({"gated-delta-inputs": NAME, "gated-norm": NAME}))
    x = mx.random.normal((1, 40, 256)).astype(dtype)
    whole, cache = ArraysCache(2), ArraysCache(2)
    expected = stock(x, None, whole)
    found, at = [mixer(x[:, :6], None, cache)], 6
    rollback = TapeReplayRollback(defer=defer)
    for tokens, keep in ((16, 8), (16, 16), (8, 1), (16, 9)):
        speculation = rollback.begin(cache, mx.zeros((1, tokens)))
        found.append(mixer(x[:, at : at + tokens], None, speculation.entry)[:, :keep])
        speculation.commit((keep - 1,))
        at += keep
    assert at == 40
    tolerance = 2e-3 if dtype == mx.float32 else 4e-2  # CUDA multiplies float32 in TF32
    assert difference(mx.concatenate(found, axis=1), expected) < tolerance
    assert difference(cache[1], whole[1]) < tolerance


def test_deferred_replay_gives_the_bits_of_a_replay_at_the_commit():
    keys = iter(mx.random.split(mx.random.key(5), 8))
    q, k = (mx.random.normal((1, 16, 2, 64), key=next(keys)) / 8 for _ in range(2))
    v = mx.random.normal((1, 16, 4, 64), key=next(keys))
    g, beta = (mx.random.uniform(0.1, 1, (1, 16, 4), key=next(keys)) for _ in range(2))
    state = mx.random.normal((1, 4, 64, 64), key=next(keys))
    block = (q, k, v, g, beta)
    _, tape, _ = gated_delta.verify(*block, state, write_state=False)
    for count in (1, 8, 16):
        y, again, middle, _ = gated_delta.replay_verify(tape, count, block, state)
        replayed = gated_delta.replay(state, tape, count)
        other, wanted, _ = gated_delta.verify(*block, replayed)
        assert mx.array_equal(middle, replayed), count
        assert mx.array_equal(y, other), count
        assert mx.array_equal(again.delta, wanted.delta), count
