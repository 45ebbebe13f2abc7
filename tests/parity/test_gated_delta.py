"""Gated delta rule: the array paths against the reference and against stock mlx-lm."""

import mlx.core as mx
import pytest
from mlx_lm.models.gated_delta import gated_delta_ops

from draftloom.kernels import gated_delta
from draftloom.kernels.gated_delta import array, chunked, reference

# Relative error (norm of the difference over norm) allowed against the float32 reference. The state
# is float32 for every input dtype; y is rounded to the dtype of q.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 6e-3}
CHUNKED_STATE = 2e-6
DTYPES = [
    pytest.param(mx.float32, id="fp32"),
    pytest.param(mx.float16, id="fp16"),
    pytest.param(mx.bfloat16, id="bf16"),
]
LENGTHS = [pytest.param(n, id=f"T{n}") for n in (1, 5, 16, 63)]
HEADS = [pytest.param(1, id="Hv=Hk"), pytest.param(2, id="Hv=2Hk"), pytest.param(4, id="Hv=4Hk")]
MASKS = [pytest.param(False, id="unmasked"), pytest.param(True, id="masked")]


def case(tokens, dtype=mx.float32, *, sharing=2, sizes=(32, 64), rows=2, key_heads=2, seed=0):
    """q, k, v, g, beta, state as a model would give them."""
    mx.random.seed(seed)
    key, value = sizes

    def unit(x):
        return x / mx.sqrt((x * x).sum(axis=-1, keepdims=True))

    q = unit(mx.random.normal((rows, tokens, key_heads, key))) * key**-0.5
    k = unit(mx.random.normal((rows, tokens, key_heads, key)))
    v = mx.random.normal((rows, tokens, key_heads * sharing, value))
    g = mx.random.uniform(0.7, 1.0, v.shape[:3])
    beta = mx.random.uniform(0.0, 1.0, v.shape[:3])
    state = mx.random.normal((rows, key_heads * sharing, value, key))
    return [x.astype(dtype) for x in (q, k, v)] + [g, beta.astype(dtype), state]


def mask_for(rows, tokens, masked):
    """None, or a mask with holes that differ by row."""
    if not masked:
        return None
    return mx.array([[(3 * t + r) % 4 != 0 for t in range(tokens)] for r in range(rows)])


def kept(y, mask):
    """y as float32 with masked rows zeroed: they mean nothing."""
    y = y.astype(mx.float32)
    return y if mask is None else mx.where(mask[:, :, None, None], y, 0.0)


def error(found, exact):
    """Relative error; NaN counts as infinite."""
    found = found.astype(mx.float32)
    gap = mx.sqrt(((found - exact) ** 2).sum() / mx.maximum((exact**2).sum(), 1e-20)).item()
    return gap if gap == gap else float("inf")


def same(a, b):
    """Bit-equal as numbers."""
    return a.dtype == b.dtype and bool(mx.array_equal(a, b))


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_path_equals_mlx_lm_bit_for_bit(dtype, tokens, masked):
    *block, state = case(tokens, dtype)
    mask = mask_for(2, tokens, masked)
    y, end = gated_delta_ops(*block, state, mask)
    ours, tape, ours_end = gated_delta.verify(*block, state, mask)
    assert same(ours, y)
    assert same(ours_end, end)
    prefill_y, prefill_end = gated_delta.prefill(*block, state, mask)
    assert same(prefill_y, y)
    assert same(prefill_end, end)
    assert same(gated_delta.replay(state, tape, tokens), end)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_replay_equals_stopping_mlx_lm_early_row_by_row(dtype, masked):
    *block, state = case(7, dtype, rows=3)
    mask = mask_for(3, 7, masked)
    _, tape, _ = gated_delta.verify(*block, state, mask)
    counts = [0, 3, 7]
    ours = gated_delta.replay(state, tape, mx.array(counts))
    assert same(ours[0], state[0])
    for row, n in enumerate(counts[1:], start=1):
        part = [x[row : row + 1, :n] for x in block]
        part_mask = None if mask is None else mask[row : row + 1, :n]
        _, end = gated_delta_ops(*part, state[row : row + 1], part_mask)
        assert same(ours[row : row + 1], end)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("sharing", HEADS)
@pytest.mark.parametrize("tokens", [*LENGTHS, pytest.param(200, id="T200")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_rule_against_the_reference(dtype, tokens, sharing, masked):
    *block, state = case(tokens, dtype, sharing=sharing)
    mask = mask_for(2, tokens, masked)
    truth = reference.run(*block, state, mask)
    y, tape, end = chunked.verify(*block, state, mask)
    assert error(kept(y, mask), truth.y) < TOLERANCE[dtype]
    assert error(tape.delta, truth.tape.delta) < CHUNKED_STATE
    assert error(end, truth.states[:, -1]) < CHUNKED_STATE
    middle = tokens // 2
    assert error(array.replay(state, tape, middle), truth.states[:, middle]) < CHUNKED_STATE


@pytest.mark.parametrize("sharing", HEADS)
def test_array_path_against_the_reference(sharing):
    *block, state = case(9, sharing=sharing)
    truth = reference.run(*block, state)
    y, tape, end = array.verify(*block, state)
    assert error(y, truth.y) < TOLERANCE[mx.float32]
    assert error(tape.delta, truth.tape.delta) < TOLERANCE[mx.float32]
    assert error(end, truth.states[:, -1]) < TOLERANCE[mx.float32]


def test_chunked_rule_stays_finite_on_nearly_parallel_keys():
    q, k, v, _, _, state = case(256, key_heads=1, rows=1)
    k = k[:, :1] + 0.02 * k
    k = k / mx.sqrt((k * k).sum(axis=-1, keepdims=True))
    ones = mx.ones(v.shape[:3])
    truth = reference.run(q, k, v, ones, 0.99 * ones, state)
    y, end = chunked.prefill(q, k, v, ones, 0.99 * ones, state)
    assert error(y, truth.y) < 1e-3
    assert error(end, truth.states[:, -1]) < 1e-3


@pytest.mark.parametrize("tokens", [1, 15, 37, 65])
def test_chunked_gradients_equal_the_sequential_ones(tokens):
    arrays = case(tokens, rows=1, sizes=(32, 32))
    weight = mx.random.normal(arrays[2].shape)

    def loss(run):
        def value(*arguments):
            y, end = run(*arguments)
            return (y * weight).sum() + (end**2).sum()

        return mx.grad(value, argnums=list(range(6)))(*arrays)

    names = ("q", "k", "v", "g", "beta", "state")
    for name, fast, slow in zip(names, loss(chunked.prefill), loss(array.prefill), strict=True):
        assert error(fast, slow) < 1e-4, name


def test_chunked_refuses_a_chunk_that_is_no_multiple_of_16():
    with pytest.raises(ValueError, match="multiple of 16"):
        chunked.prefill(*case(5), chunk=40)


@pytest.mark.parametrize("use", [None, "chunked"])
def test_replay_verify_is_replay_then_verify(use):
    *first, state = case(5)
    *second, _ = case(6, seed=1)
    _, tape, _ = gated_delta.verify(*first, state, use=use)
    counts = mx.array([2, 5])
    y, new, middle, end = gated_delta.replay_verify(
        tape, counts, tuple(second), state, write_state=True, use=use
    )
    expected_middle = gated_delta.replay(state, tape, counts)
    expected = gated_delta.verify(*second, expected_middle, use=use)
    assert same(middle, expected_middle)
    assert same(y, expected[0])
    assert same(new.delta, expected[1].delta)
    assert same(end, expected[2])


def test_joined_tapes_replay_as_one_run():
    *block, state = case(9)
    _, whole, end = gated_delta.verify(*block, state)
    _, first, middle = gated_delta.verify(*[x[:, :4] for x in block], state)
    _, second, _ = gated_delta.verify(*[x[:, 4:] for x in block], middle)
    joined = gated_delta.concat_tapes([first, second])
    assert joined.length == whole.length == 9
    assert same(gated_delta.replay(state, joined, 9), end)
    with pytest.raises(ValueError, match="at least one"):
        gated_delta.concat_tapes([])


def test_a_masked_token_leaves_no_trace_on_the_tape():
    *block, state = case(4, rows=1)
    block[1] = mx.where(mx.array([True, False, True, True])[None, :, None, None], block[1], 1e30)
    mask = mx.array([[True, False, True, True]])
    _, tape, end = gated_delta.verify(*block, state, mask)
    assert same(gated_delta.replay(state, tape, 2), gated_delta.replay(state, tape, 1))
    assert same(gated_delta.replay(state, tape, 4), end)


def test_row_counts_are_padded_once_for_all_layers():
    *block, state = case(5)
    _, tape, _ = gated_delta.verify(*block, state)
    counts = gated_delta.row_counts(mx.array([1, 4]), 2)
    assert counts.dtype == mx.int32
    assert counts.tolist()[:2] == [1, 4]
    assert counts.shape == (4,)
    assert gated_delta.row_counts(counts, 2) is counts
    assert gated_delta.row_counts(3, 6).tolist() == [3] * 6
    expected = gated_delta.replay(state, tape, mx.array([1, 4]))
    assert same(gated_delta.replay(state, tape, counts), expected)


@pytest.mark.parametrize("n", [-1, 6])
def test_replay_refuses_a_count_outside_the_tape(n):
    *block, state = case(5)
    _, tape, _ = gated_delta.verify(*block, state)
    with pytest.raises(ValueError, match="tape of 5"):
        gated_delta.replay(state, tape, n)


def request(**changes):
    values = {
        "operation": "prefill",
        "dtype": mx.bfloat16,
        "batch": 1,
        "tokens": 128,
        "key_heads": 2,
        "value_heads": 4,
        "key_size": 128,
        "value_size": 128,
        "device": "cpu",
    }
    return gated_delta.Request(**{**values, **changes})


def test_the_cpu_gets_the_array_path_and_a_reason():
    choice = gated_delta.choose(request())
    assert choice.name == "array"
    assert "bit for bit" in choice.reason
    assert {name for name, _ in choice.rejected} == {"metal", "cuda"}


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="needs a machine without a GPU")
def test_without_a_kernel_a_gpu_request_falls_back_by_length():
    assert gated_delta.choose(request(device="gpu")).name == "chunked"
    assert gated_delta.choose(request(device="gpu", tokens=16)).name == "array"
    assert gated_delta.choose(request(device="gpu", operation="verify")).name == "array"


def test_an_unknown_implementation_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        gated_delta.choose(request(), use="chunk")


def test_an_implementation_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match="no replay of its own"):
        gated_delta.choose(request(operation="replay"), use="chunked")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_size": 48}, "Dk = 48"),
        ({"value_size": 288}, "Dv = 288"),
        ({"value_heads": 3}, "not a multiple"),
        ({"dtype": mx.int32}, "dtype"),
        ({"batch": 65536}, "grid"),
        ({"tokens": 0}, "T = 0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_kernels_say_which_shapes_they_do_not_serve(changes, reason):
    from draftloom.kernels.gated_delta.launch import unsupported_shape

    assert unsupported_shape(request()) is None
    assert reason in unsupported_shape(request(**changes))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, g, beta, state = case(5)
    with pytest.raises(ValueError, match="state"):
        gated_delta.verify(q, k, v, g, beta, state.astype(mx.float16))
    with pytest.raises(ValueError, match="do not fit"):
        gated_delta.verify(q[:, :4], k[:, :4], v, g, beta, state)
    with pytest.raises(ValueError, match="beta"):
        gated_delta.verify(q, k, v, g, beta[:, :4], state)
