"""Passes that are traced once and replayed: the same text and the same caches, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from draftloom.adapters import compiled_pass, traced_caches
from draftloom.adapters.compiled_pass import MOST_TOKENS, MOST_TRACES
from draftloom.errors import GenerationError
from draftloom.kernel_settings import KernelSettings, implementations
from tests.support import cases, models, pipelines
from tests.support.cases import Case
from tests.support.pipelines import adapter
from tests.support.profile import examples

ON = {"compiled-pass": "on"}
PROMPT = tuple(i * 7 % models.VOCAB for i in range(1, 9))
FAST = ("qwen3_5-v2", "qwen3_5-experts", "qwen3_next", "qwen3", "qwen3_moe", "llama-tied")
LONG = 300


def plain(model: nn.Module, count: int, **options: Any) -> tuple[int, ...]:
    steps = generate_step(mx.array(PROMPT), model, max_tokens=count, **options)
    return tuple(int(token) for token, _ in steps)


def compiled_of(pipeline: Any) -> Any:
    return pipeline._parts.target.compiled


def scripted(builder: Any, text: tuple[int, ...], mode: str = "mixed", seed: int = 3) -> Any:
    return builder.drafter(
        "test.scripted", text=text, vocab_size=models.VOCAB, mode=mode, seed=seed, taps=(0, 2)
    )


@pytest.mark.parametrize("family", FAST)
def test_tokens_and_caches_after_every_cycle(family: str, tmp_path: Path) -> None:
    """`cases.run` compares every cache with a fresh prefill by plain mlx-lm, bit for bit."""
    tried = 0

    @examples(5, family)
    @given(
        st.sampled_from(cases.rollbacks_for(family)),
        st.sampled_from(cases.VERIFIERS),
        st.sampled_from(("scripted-mixed", "scripted-half", "dflash", "prompt-lookup", "none")),
        st.integers(1, 9),
        st.lists(st.integers(0, models.VOCAB - 1), min_size=1, max_size=12),
        st.sampled_from((3, 2048)),
        st.sampled_from(({}, {"fixed-length-caches": "allocated"})),
    )
    def check(
        rollback: str,
        verifier: str,
        drafter: str,
        block: int,
        prompt: list[int],
        chunk: int,
        kernels: dict[str, str],
    ) -> None:
        nonlocal tried
        one = Case(
            family, drafter, rollback, verifier, block, tuple(prompt), len(prompt), chunk,
            tuple({**ON, **kernels}.items()),
        )  # fmt: skip
        tried += cases.run(one, tmp_path)

    check()
    assert tried > 20


@pytest.mark.parametrize("rollback", ["auto", "snapshot", "deferred"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_a_hundred_cycles_past_an_allocation(family: str, rollback: str) -> None:
    expected = plain(models.stock(family), LONG)
    script = PROMPT + expected + expected[:16]
    builder = scripted(pipelines.builder(models.build(family)), script).width(4)
    choices = {**ON, **cases.KERNELS.get(rollback, {})}
    builder = builder.rollback(cases.ROLLBACKS[rollback]).kernels(choices)
    with builder.build() as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=LONG)
        compiled = compiled_of(pipeline)
        assert not compiled.why_not
    assert result.token_ids == expected
    assert result.stats.cycles >= 100
    assert not result.stats.fell_back
    assert 0 < compiled.traced <= MOST_TRACES
    assert compiled.replayed >= result.stats.cycles > 4 * compiled.traced


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_with_every_other_kernel(family: str, tmp_path: Path) -> None:
    """All of the last registered ones, but early launches and another order of sums."""
    known = [one for one in implementations(pipelines.plugins()) if one.why_not_here is None]
    choices = {one.operation: one.name for one in known if one.name not in ("chunked", "block")}
    del choices["early-launch"]
    assert choices["compiled-pass"] == "on"
    one = Case(
        family, "dflash", "auto", "block", 7, PROMPT, kernels=tuple(choices.items())
    )  # fmt: skip
    assert cases.run(one, tmp_path) > 2


def test_plain_cycles_in_flight_are_compiled() -> None:
    family = "qwen3_5"
    expected = plain(models.stock(family), 40)
    with pipelines.builder(models.build(family)).drafter("none").kernels(ON).build() as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=40).token_ids == expected
        compiled = compiled_of(pipeline)
        assert compiled.replayed >= 40 > 20 > compiled.traced


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
@pytest.mark.parametrize("always", [False, True])
def test_a_failing_pass_loses_no_token(family: str, always: bool) -> None:
    expected = plain(models.stock(family), 24)
    builder = scripted(pipelines.builder(models.build(family)), PROMPT + expected * 2).width(4)
    builder = builder.verifier("test.failing", at=3, always=always).kernels(ON)
    with builder.build() as pipeline:
        if always:
            with pytest.raises(GenerationError) as caught:
                pipeline.generate(PROMPT, max_tokens=24)
            found = caught.value.token_ids
            assert 3 <= len(found) < 24
        else:
            found = pipeline.generate(PROMPT, max_tokens=24).token_ids
            assert len(found) == 24
        assert found == expected[: len(found)]
        assert compiled_of(pipeline).replayed > 0


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_an_error_while_tracing_leaves_the_caches(family: str) -> None:
    with adapter(models.build(family)) as target:
        target.tune(KernelSettings.of(ON))
        cache = target.make_cache()
        target.forward(mx.array([PROMPT]), cache)
        before = [np.array(a) for e in cache for a in _arrays(e)]
        broken: Any = RuntimeError("no such kernel")

        def forward(tokens: mx.array, caches: list[Any]) -> Any:
            target._forward(tokens, caches)
            raise broken

        with pytest.raises(RuntimeError, match="no such kernel"):
            target.compiled.run(forward, mx.array([[1]]), cache)
        after = [np.array(a) for e in cache for a in _arrays(e)]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        logits = target._forward(mx.array([[1]]), cache).logits
        stock = models.stock(family)
        expected = stock(mx.array([[*PROMPT, 1]]))[:, -1:]
        assert mx.allclose(logits, expected, atol=1e-4)


def _arrays(entry: Any) -> list[mx.array]:
    if hasattr(entry, "offset"):
        return [entry.keys[..., : entry.offset, :], entry.values[..., : entry.offset, :]]
    return [a for a in entry.cache if a is not None]


# --- what is refused, what drops a trace ------------------------------------------------------


def test_sliding_windows_run_as_they_are_and_say_so() -> None:
    model = models.new(models.SLIDING)
    expected = plain(models.new(models.SLIDING), 16)
    with scripted(pipelines.builder(model), PROMPT + expected * 2).kernels(ON).build() as pipeline:
        assert "no use here: it has sliding-window caches" in " ".join(pipeline.describe().split())
        assert pipeline.generate(PROMPT, max_tokens=16).token_ids == expected
        assert compiled_of(pipeline).replayed == 0


def test_packed_caches_run_as_they_are() -> None:
    model = models.new(models.FAMILIES["llama"], head_dim=32, hidden_size=128)
    packed: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12}
    expected = plain(model, 16, **packed)
    builder = pipelines.builder(model).drafter("none").kernels(ON).kv_cache(**packed)
    with builder.build() as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=16).token_ids == expected
        assert 0 < compiled_of(pipeline).replayed < 10


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3"])
def test_what_cannot_be_traced_is_said_before_any_pass(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    class OnTheHost(nn.Module):
        def __init__(self, rope: nn.Module) -> None:
            super().__init__()
            self.rope = rope

        def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
            return self.rope(x, offset=int(offset))

    model = models.new(models.FAMILIES[family])
    for layer in model.layers:
        if "self_attn" in layer:
            layer.self_attn.rope = OnTheHost(layer.self_attn.rope)
    expected = plain(models.stock(family), 12)
    with (
        caplog.at_level(logging.WARNING, "draftloom.kernels"),
        pipelines.builder(model).drafter("none").kernels(ON).build() as pipeline,
    ):
        assert pipeline.generate(PROMPT, max_tokens=12).token_ids == expected
        assert compiled_of(pipeline).why_not
        assert compiled_of(pipeline).replayed == 0
    assert "run as they are" in caplog.text


def test_early_launches_cannot_be_had_besides(caplog: pytest.LogCaptureFixture) -> None:
    choices = {**ON, "early-launch": "eighths"}
    with (
        caplog.at_level(logging.WARNING, "draftloom.kernels"),
        adapter(models.build("qwen3")) as target,
    ):
        target.tune(KernelSettings.of(choices))
        assert "early launches" in target.compiled.why_not
        target.tune(KernelSettings.of(ON))
        assert not target.compiled.why_not
    assert "early launches" in caplog.text
    described = pipelines.builder(models.build("qwen3")).drafter("none").kernels(choices).check()
    assert "no use here: early launches" in " ".join(described.graph.describe().split())


def test_off_by_default_and_prompts_never() -> None:
    with adapter(models.build("qwen3")) as target:
        target.tune(KernelSettings())
        cache = target.make_cache()
        for _ in range(2):
            target.forward(mx.array([PROMPT]), cache)
        assert target.compiled.replayed == target.compiled.traced == 0
        target.tune(KernelSettings.of(ON))
        target.forward(mx.zeros((1, MOST_TOKENS + 1), dtype=mx.int32), cache)
        assert target.compiled.replayed == 0
        target.forward(mx.array([PROMPT]), cache)
        assert target.compiled.replayed == 1


@pytest.mark.parametrize("change", ["weight", "module", "nested", "removed", "tap"])
def test_what_is_exchanged_is_seen(change: str) -> None:
    model = models.new(models.FAMILIES["qwen3"])
    other = models.new(models.FAMILIES["qwen3"], 5)
    model.spare = other.lm_head
    with adapter(model) as target:
        target.tune(KernelSettings.of(ON))
        cache = target.make_cache()
        target.forward(mx.array([PROMPT]), cache)
        for token in (3, 4):
            assert target.forward(mx.array([[token]]), cache).features is None
        assert (target.compiled.traced, target.compiled.replayed) == (1, 2)
        if change == "weight":
            model.lm_head.weight = other.lm_head.weight
        elif change == "module":
            model.lm_head = other.lm_head
        elif change == "nested":
            model.model.layers[1].mlp = other.model.layers[1].mlp
        elif change == "removed":
            del model.spare
        else:
            target.tap((1,))
        given = target.forward(mx.array([[5]]), cache)
        cache[0].trim(1), cache[1].trim(1), cache[2].trim(1)
        expected = target._forward(mx.array([[5]]), cache)
        assert target.compiled.traced == 2
        assert mx.array_equal(given.logits, expected.logits)
        assert (given.features is None) == (change != "tap")


def test_the_form_of_the_next_pass_is_known_to_the_trace() -> None:
    """What a trace says of a pass over the state that it leaves is what its arrays say; equal forms
    are one object; and widths that come again are not traced again."""
    family = models.FAMILIES["qwen3_5-v2"]
    choices = {**ON, "replay-verify": "on"}
    with pipelines.builder(models.new(family)).drafter("none").kernels(choices).build() as pipeline:
        target, open_speculation = pipeline._parts.target, pipeline._parts.open_speculation
        cache = target.make_cache()
        target.forward(mx.array([PROMPT]), cache)
        forms: set[int] = set()
        for cycle in range(24):
            width = (3, 5, 3, 3, 5, 5)[cycle % 6]
            block = mx.array([[(cycle * 5 + i) % models.VOCAB for i in range(width)]])
            speculation = open_speculation(cache, block)
            target.forward(block, speculation.cache)
            speculation.commit((cycle % width,))
            for entry in cache:
                left = getattr(getattr(entry, "cache", None), "deferred", None)
                if left is not None:
                    made = traced_caches._RecordForm.after(entry.cache.windows, left)
                    assert left.form == made
                    forms.add(id(left.form))
            if cycle == 11:
                traced = target.compiled.traced
        assert len(forms) == 2  # one for each width
        assert target.compiled.replayed == 24
        assert target.compiled.traced == traced
        assert mx.isfinite(target.forward(mx.array([[1]]), cache).logits).all()


def test_buffers_are_written_where_they_lie() -> None:
    """The keys and values of a long context are not copied by a pass."""
    model = models.new(models.FAMILIES["qwen3"], head_dim=64)
    with adapter(model) as target:
        target.tune(KernelSettings.of(ON))
        cache = target.make_cache()
        target.forward(mx.array([PROMPT]), cache)
        for entry in cache:
            more = mx.zeros((1, 2, 16384 - entry.keys.shape[2], 64))
            entry.keys = mx.concatenate([entry.keys, more], axis=2)
            entry.values = mx.concatenate([entry.values, more], axis=2)
        mx.eval([entry.state for entry in cache])
        peaks = []
        for _ in range(3):
            mx.synchronize()
            mx.reset_peak_memory()
            held = mx.get_active_memory()
            logits = target.forward(mx.array([[7]]), cache).logits
            mx.eval(logits, [entry.state for entry in cache])
            del logits
            peaks.append(mx.get_peak_memory() - held)
        buffer = cache[0].keys.nbytes
        assert target.compiled.replayed == 3
    assert max(peaks) < buffer, f"{peaks} bytes on top; a buffer has {buffer}"


@pytest.mark.parametrize(("family", "why_not"), [("qwen3_5", ""), ("qwen3", "it is off")])
def test_by_default_hybrids_are_traced_on_cuda(
    family: str, why_not: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda in (False, True):
        monkeypatch.setattr(compiled_pass, "on_cuda", lambda cuda=cuda: cuda)
        with pipelines.builder(models.build(family)).drafter("none").build() as pipeline:
            found = pipeline._parts.target.compiled.why_not
            assert found == (why_not if cuda else "it is off")
        assert compiled_pass.on.by_default() == cuda
