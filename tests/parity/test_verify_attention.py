"""Verify attention: the array path, which implementation serves, and what runs inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from draftloom import PipelineBuilder
from draftloom.adapters.attention_module import AttentionModule, Weighting
from draftloom.adapters.verify_attention import VerifyAttention
from draftloom.caches.fixed_length import FixedLengthEntry
from draftloom.contracts import ComponentInfo
from draftloom.hookspecs import Register, hookimpl
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels import verify_attention
from draftloom.kernels.backend import Backend
from draftloom.kernels.verify_attention import Request, choose, dispatch, reference
from draftloom.kernels.verify_attention.checks import CASES as CHECKED
from draftloom.kernels.verify_attention.checks import checks_of
from draftloom.kernels.verify_attention.launch import Launcher, unsupported_shape
from draftloom.kernels.verify_attention.prelude import METAL_PRELUDE
from draftloom.plugins import PluginManager
from tests.parity.metal_shim import emulator, needs_compiler
from tests.support import models, pipelines
from tests.support.attention_cases import CASES, TOLERANCE, Case, error, truth
from tests.support.families_more import MORE, adapted, new_model
from tests.support.oracle import greedy, text_model

BASE = Request(mx.bfloat16, 1, 16, 16, 4, 256, "gpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_array_path_against_the_reference(case: Case) -> None:
    q, k, v, sinks = case.arrays()
    found = verify_attention.attend(
        q, k, v, mx.array(case.lengths), scale=case.scale, window=case.window, sinks=sinks
    )
    assert found.dtype == case.dtype
    assert error(found, truth(case)) < 1.5 * TOLERANCE[case.dtype]  # MLX rounds the scores too


@pytest.mark.parametrize("window", [None, 7])
def test_on_the_cpu_the_array_path_with_one_length_is_mlx_lms_call(window: int | None) -> None:
    q, k, v, _ = CASES[2].arrays()
    mask: Any = "causal"
    if window is not None:
        cache = KVCache()
        cache.offset = 36
        mask = cache.make_mask(5, return_array=False, window_size=window)
    stock = mx.fast.scaled_dot_product_attention(
        q, k[:, :, :41], v[:, :, :41], scale=0.2, mask=mask
    )
    assert mx.array_equal(
        verify_attention.attend(q, k, v, 41, scale=0.2, window=window, use="array"), stock
    )


def test_the_reference_is_attention_with_a_mask() -> None:
    """Against MLX's own, sinks included: the reference is not its own judge."""
    case = CASES[7]
    q, k, v, sinks = case.arrays()
    mask = reference.visible(mx.array(case.lengths), case.queries, case.allocated, case.window)
    assert mask[0].sum(axis=-1).tolist() == [40] * 32
    assert mask[0, 0].tolist().index(True) == 129 - 32 - 40 + 1
    found = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=case.scale, mask=mask[:, None], sinks=sinks
    )
    assert error(found, truth(case)) < 1.5 * TOLERANCE[case.dtype]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 96}, "D = 96"),
        ({"queries": 33}, "M = 33"),
        ({"dtype": mx.int32}, "int32"),
        ({"batch": 20000}, "80000"),
        ({"window": 0}, "window of 0"),
        ({}, None),
        ({"queries": 32, "heads": 64, "size": 64, "window": 128, "sinks": True}, None),
    ],
)
def test_what_the_kernel_takes(change: dict[str, Any], reason: str | None) -> None:
    fields = {name: getattr(BASE, name) for name in Request.__slots__ if name[0] != "_"}
    found = unsupported_shape(Request(**(fields | change)))
    assert found is None if reason is None else reason in str(found)


def test_no_kernel_is_chosen_before_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert frozenset({"cuda"}) == verify_attention.TIMED
    other = attrs.evolve(BASE, size=64 if BASE.size == 256 else 256)
    timed, untimed = (BASE, other) if BASE.size == 256 else (other, BASE)
    for name in ("cuda", "metal"):
        monkeypatch.setitem(dispatch._MODULES, name, _Recorder(name))
    choose.cache_clear()
    assert choose(timed).name == "cuda"
    assert "has not been timed" in dict(choose(timed).rejected)["metal"]
    assert choose(untimed).name == "array"
    assert "has not been timed" in dict(choose(untimed).rejected)["cuda"]
    assert choose(untimed, "cuda").name == "cuda"
    monkeypatch.setattr(dispatch, "TIMED", frozenset())
    choose.cache_clear()
    assert choose(timed).name == "array"
    choose.cache_clear()


def test_what_cannot_serve_gives_way_and_says_why() -> None:
    choice = choose(BASE, _Recorder("mine", "only on Sundays"))
    assert choice.name == "array"
    assert choice.rejected == (("mine", "only on Sundays"),)
    with pytest.raises(ValueError, match="did you mean 'metal'"):
        choose(BASE, "metl")


def test_the_self_tests_checks_tell_right_from_wrong() -> None:
    assert all(check.run().passed for check in verify_attention.array.checks())
    right = [check.run() for check in checks_of(_Recorder())]
    assert len(right) == len(CHECKED)
    assert all(outcome.passed for outcome in right)
    assert not any(check.run().passed for check in checks_of(_Shifted()))
    assert list(verify_attention.cuda.checks()) == [], "it cannot run on the CPU"
    assert verify_attention.array.by_default()
    assert not verify_attention.cuda.by_default()


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, _ = CASES[2].arrays()
    with pytest.raises(ValueError, match="do not fit"):
        verify_attention.attend(q, k, v[:, :, :5], 5, scale=1.0)
    with pytest.raises(ValueError, match="5 to 64 are possible"):
        verify_attention.attend(q, k, v, 65, scale=1.0)
    with pytest.raises(ValueError, match="multiple"):
        verify_attention.attend(q[:, :3], k, v, 41, scale=1.0)


# --- inside a model ---------------------------------------------------------------------------


class _Recorder:
    """A third party's implementation: the reference on the whole buffers, which counts calls."""

    def __init__(self, name: str = "test.reference", reason: str | None = None) -> None:
        self.name = name
        self.reason = reason
        self.calls: list[tuple[int, int]] = []
        self.lengths: list[mx.array] = []

    def supports(self, request: Request) -> str | None:
        return self.reason or (f"M = {request.queries}" if request.queries > 32 else None)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, lengths: mx.array, **more: Any
    ) -> mx.array:
        self.calls.append((q.shape[2], k.shape[2]))
        self.lengths.append(lengths)
        return reference.attend(q, k, v, lengths[: q.shape[0]], **more).astype(q.dtype)


class _Shifted(_Recorder):
    """One that does not see the newest key."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, lengths: mx.array, **more: Any
    ) -> mx.array:
        return super().attend(q, k, v, lengths - 1, **more)


def tokens(count: int, start: int) -> mx.array:
    return mx.array([[(start + 7 * i) % models.VOCAB for i in range(count)]], dtype=mx.int32)


@pytest.mark.parametrize("view", [False, True], ids=["cache", "view"])
@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_blocks_and_steps_are_served_from_the_caches_buffers(family: str, view: bool) -> None:
    recorder, stock = _Recorder(), models.stock(family)
    with pipelines.adapter(models.build(family)) as target:
        target.attention.replace(lambda a: AttentionModule(a, VerifyAttention(recorder)))
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        shown = [FixedLengthEntry(e) if view and type(e) is KVCache else e for e in ours]
        layers = len(target.attention)
        for count, start in ((40, 1), (6, 3), (1, 5), (17, 2)):
            entries = ours if count == 40 else shown
            found = target.model(tokens(count, start), cache=entries)
            expected = stock(tokens(count, start), cache=theirs)
            assert mx.allclose(found, expected, rtol=0, atol=1e-4)
        assert recorder.calls == [(n, 256) for n in (6, 1, 17) for _ in range(layers)]
        attend = text_model(target.model).model.layers[-1].self_attn._attend
        assert attend._valid(64, 1) is attend._valid(64, 1)  # one array for all layers


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_full_layers_between_sliding_ones_with_sinks(family: str) -> None:
    recorder, stock = _Recorder(), new_model(MORE[family])
    with adapted(MORE[family]) as target:
        target.attention.replace(lambda a: AttentionModule(a, VerifyAttention(recorder)))
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        plain = sum(type(entry) is KVCache for entry in ours)
        assert 0 < plain < len(ours)
        for count, start in ((40, 1), (6, 3), (5, 5)):
            found = target.model(tokens(count, start), cache=ours)
            expected = stock(tokens(count, start), cache=theirs)
            assert mx.allclose(found, expected, rtol=0, atol=1e-4)
        assert recorder.calls == [(n, 256) for n in (6, 5) for _ in range(plain)]


def test_prompts_windows_and_packed_caches_stay_with_mlx_lm() -> None:
    recorder = _Recorder()
    attend = VerifyAttention(recorder)
    q, k, v, _ = CASES[2].arrays()
    rotating, packed = RotatingKVCache(64), KVCache()
    rotating.update_and_fetch(k, v)
    packed.update_and_fetch(k, v)
    odd = mx.tri(5, 64, 59, dtype=mx.bool_)
    for cache, mask in ((rotating, None), (packed, odd), (packed, None), (None, "causal")):
        found = attend(q, k, v, cache, Weighting(0.1, mask))
        stock = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)
        assert mx.array_equal(found, stock)
    assert recorder.calls == []
    attend(q, k, v, packed, Weighting(0.1, "causal"))
    assert recorder.calls == [(5, 256)]
    half = attend(q.astype(mx.float16), k, v, packed, Weighting(0.1, "causal"))
    assert recorder.calls == [(5, 256)], "queries of another type than the cache's"
    assert half.shape == q.shape


@pytest.mark.parametrize(
    ("choice", "replaced"), [("auto", False), ("off", False), ("array", True), ("metal", True)]
)
def test_nothing_is_replaced_unless_it_is_asked_for(choice: str, replaced: bool) -> None:
    """A kernel that cannot run here is refused when the pipeline is checked, not here."""
    stock = models.stock("qwen3")
    with pipelines.adapter(models.build("qwen3")) as target:
        target.tune(KernelSettings.of({"verify-attention": choice}))
        module = target.model.model.layers[0].self_attn
        assert isinstance(module, AttentionModule) == replaced
        found = target.model(tokens(6, 3), cache=make_prompt_cache(stock))
        assert mx.array_equal(found, stock(tokens(6, 3), cache=make_prompt_cache(stock)))
        target.tune(KernelSettings())
        assert type(target.model.model.layers[0].self_attn) is type(stock.model.layers[0].self_attn)


class _Plugin:
    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation

    @hookimpl
    def register_kernels(self, register: Register) -> None:
        name = "verify-attention/test.reference"
        register(name, self._implementation, ComponentInfo(name, "the reference"))


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_5"])
@pytest.mark.parametrize("choice", ["array", "test.reference"])
def test_a_pipeline_gives_mlx_lms_tokens(family: str, choice: str) -> None:
    recorder = _Recorder()
    plugins = PluginManager(entry_points=False, extra=[_Plugin(recorder)])
    builder = PipelineBuilder(plugins=plugins).model(models.build(family), None).own_width()
    settings = {"verify-attention": choice, "fixed-length-caches": "allocated"}
    if choice == "array":
        del settings["fixed-length-caches"]
    with builder.drafter("prompt-lookup").kernels(settings).build() as pipeline:
        found = pipeline.generate([1, 5, 9, 2], max_tokens=24)
    assert list(found.token_ids) == greedy(models.stock(family), [1, 5, 9, 2], 24)
    assert choice == "array" or any(queries > 1 for queries, _ in recorder.calls)


@needs_compiler
def test_the_emulated_kernel_inside_a_model(tmp_path: Path) -> None:
    launcher = Launcher(
        Backend("metal", emulator.Emulator(tmp_path), METAL_PRELUDE), poison=float("nan")
    )

    class Emulated:
        name = "test.emulated"
        attend = staticmethod(launcher.attend)

        @staticmethod
        def supports(request: Request) -> str | None:
            return unsupported_shape(request)

    made = [models.new(models.FAMILIES["qwen3"], head_dim=64) for _ in range(2)]
    stock, model = made
    with pipelines.adapter(model) as target:
        target.attention.replace(lambda a: AttentionModule(a, VerifyAttention(Emulated())))
        ours, theirs = make_prompt_cache(stock), make_prompt_cache(stock)
        for count in (40, 5, 1):
            found = target.model(tokens(count, count), cache=ours)
            expected = stock(tokens(count, count), cache=theirs)
            assert mx.allclose(found, expected, rtol=0, atol=1e-4)
