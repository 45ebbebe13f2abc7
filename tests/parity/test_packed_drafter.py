"""A drafter's fast path: fewer products with the same bits, work for no row that is not needed,
and a context that grows in place. What is said of a cost is counted here."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from draftloom import KernelSettings
from draftloom.abilities import BindContext, DraftsInPart
from draftloom.apps.bench.prompts import EncodedPrompt
from draftloom.apps.bench.simulate import SimulatedDFlash
from draftloom.apps.bench.stages import time_stages
from draftloom.contracts import Draft, DraftRequest
from draftloom.drafters.cascade import CascadeDrafter
from draftloom.drafters.dflash import DFlashDrafter, DFlashModel
from draftloom.drafters.dflash.context import STEP
from draftloom.drafters.dflash.one_product import OPERATION
from draftloom.drafters.prompt_lookup import PromptLookupDrafter
from draftloom.kernels.packed_projections import OneProduct, ProductStack, plan
from draftloom.memory import module_bytes
from draftloom.model_info import ModelInfo
from draftloom.plugins import PluginManager
from draftloom.sampling import SamplingParams, SamplingState
from tests.parity import test_dflash2, test_formats
from tests.parity.test_dflash import HIDDEN, SLIDING, VOCAB, FakeTarget, features
from tests.support.checkpoints import write as write_golden
from tests.support.pipelines import dflash_checkpoint
from tests.unit import fakes

CHOICES = ("packed", "attention", "context", "mlp", "measure")
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {"num_hidden_layers": 3, "block_size": 8},
    "mixed": {"num_hidden_layers": 3, "block_size": 8, "sliding_window": 6, **SLIDING},
}
GREEDY = SamplingParams()


def bound(folder: Path, target: Any, choice: str = "off", **options: Any) -> Any:
    """A drafter of any kind with its weights, its projections packed as said."""
    manager = PluginManager(entry_points=False)
    description = manager.describe_checkpoint(ModelInfo.from_path(folder))
    assert description is not None
    component = manager.component("drafter", description.drafter)
    drafter = component.make({"checkpoint": description, **options})
    kernels = KernelSettings.of({OPERATION: choice})
    unused: Any = lambda given: None  # noqa: E731
    drafter.bind(BindContext(target, "float32", unused, unused, kernels))
    return drafter


def opened(drafter: Any, state: SamplingState, vocab: int = VOCAB) -> Any:
    return drafter.open(DraftRequest(((0,),), state, vocab))


def drafts(drafter: Any, target: FakeTarget, rows: int) -> list[np.ndarray]:
    """Hidden states of drafts between which the context grows, beyond a window too."""
    state = SamplingState(GREEDY)
    session, found = opened(drafter, state), []
    taps, start = mx.array(features(rows, 64)), 0
    for count, width in [(5, 7), (1, 3), (0, 7), (17, 7), (3, 1), (30, 5)]:
        if count:
            session.observe(([0] * count,) * rows, taps[:, start : start + count])
            start += count
        anchor = mx.array([(7 * r + width) % VOCAB for r in range(rows)], dtype=mx.int32)
        mx.eval(session.propose(anchor, width, state).tokens)
        found.append(target.hidden)
    return found


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_fewer_products_give_the_same_bits(
    name: str, bits: int | None, choice: str, rows: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(plan, "ratios", lambda places, seconds: {1: 0.5, 16: 0.5})
    folder = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), intermediate_size=64, **CONFIGS[name]
    )
    options = {"bits": bits, "window": 9, "sinks": 2}
    target = FakeTarget()
    apart = bound(folder, target, **options)
    wanted = drafts(apart, target, rows)
    drafter = bound(folder, target, choice, **options)
    network = drafter._loaded.network
    kinds = {"attention", "context", "mlp"} if choice in ("packed", "measure") else {choice}
    for layer in network.layers:
        assert (layer.self_attn.product is not None) == ("attention" in kinds)
        assert (layer.mlp.product is not None) == ("mlp" in kinds)
    assert (network.packed_context is not None) == ("context" in kinds)
    found = drafts(drafter, target, rows)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert drafter.memory() == apart.memory()


def test_every_context_row_of_all_layers_is_one_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a block is two products a layer besides o and down; nothing runs apart."""
    folder = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=3
    )
    target = FakeTarget()
    drafter = bound(folder, target, "packed")
    counts: dict[str, list[int]] = {"linear": [], "product": [], "stack": []}
    for kind, owner, method in (
        ("linear", nn.Linear, "__call__"),
        ("product", OneProduct, "__call__"),
        ("stack", ProductStack, "over_all"),
    ):
        whole = getattr(owner, method)

        def count(self: Any, x: mx.array, whole: Any = whole, kind: str = kind) -> Any:
            counts[kind].append(x.shape[1])
            return whole(self, x)

        monkeypatch.setattr(owner, method, count)
    state = SamplingState(GREEDY)
    session = opened(drafter, state)
    session.observe(([0] * 11,), mx.array(features(1, 11)))
    mx.eval(session.propose(mx.array([3]), 7, state).tokens)
    assert counts["stack"] == [11]
    assert counts["product"] == [8, 8] * 2 + [8, 7]  # the last MLP is for the slots that count
    assert counts["linear"] == [11] + [8] * 4 + [7] * 2  # fc; o and down


def test_memory_does_not_double(tmp_path: Path) -> None:
    folder = dflash_checkpoint(
        tmp_path, hidden=256, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=8, head_dim=32, intermediate_size=512,
    )  # fmt: skip
    target: Any = FakeTarget()
    target.embed = lambda tokens: mx.zeros((*tokens.shape, 256))
    used, sizes = [], []
    for choice in ("off", "packed"):
        gc.collect()
        before = mx.get_active_memory()
        drafter = bound(folder, target, choice)
        mx.eval(drafter._loaded.network.parameters())
        used.append(mx.get_active_memory() - before)
        sizes.append(module_bytes(drafter._loaded.network))
        del drafter
    assert sizes[0] == sizes[1]
    assert used[1] < used[0] * 1.02
    assert used[0] > 0.9 * sizes[0]


def test_layers_that_differ_stay_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from draftloom.drafters.dflash.one_product import pack_network

    folder = dflash_checkpoint(tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1,), num_hidden_layers=2)
    network = bound(folder, FakeTarget())._loaded.network
    attention = network.layers[1].self_attn
    attention.k_proj = attention.k_proj.to_quantized(group_size=32, bits=8)
    decision = pack_network(network, "packed")
    assert decision is not None
    assert decision.kinds == {"mlp"}
    assert attention.product is None
    assert network.packed_context is None
    assert "projections stay apart: q_proj and k_proj and v_proj differ" in caplog.text
    caplog.clear()
    network = bound(folder, FakeTarget())._loaded.network
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = network.layers[1].self_attn[name]
        linear.weight = linear.weight.astype(mx.bfloat16)
    with caplog.at_level(logging.WARNING, "draftloom.kernels"):
        decision = pack_network(network, "context")
    assert decision is not None
    assert decision.kinds == set()
    assert "projections stay apart: the layers differ in size or type" in caplog.text
    assert pack_network(network, "off") is None


# --- rows that nobody needs -------------------------------------------------------------------


GOLDEN = {
    **{f"dflash2-{name}": case for name, case in test_dflash2.CASES.items() if "factors" in name},
    **{n: c for n, c in test_formats.CASES.items() if n in ("dspark", "dspark-reduced-rnn")},
    **{n: c for n, c in test_formats.CASES.items() if n.startswith("zlab-") or "narrow" in n},
    "speculators-reduced": test_formats.CASES["speculators-reduced"],
}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.8, seed=4)],
                         ids=["greedy", "drawn"])  # fmt: skip
@pytest.mark.parametrize("name", GOLDEN)
def test_the_first_of_many_slots_are_those_of_all(
    name: str, params: SamplingParams, tmp_path: Path
) -> None:
    """Tokens, laws and lengths, for every number of slots that are read out."""
    form, golden = GOLDEN[name]
    target = test_formats.FakeTarget(golden)
    drafter = bound(write_golden(tmp_path, form, golden), target)
    most = golden.block - golden.first_slot
    taps = mx.array(test_formats.taps_of(golden, 13))
    for width, count in {(most, 1), (most, 2), (most, most - 1), (3, 2), (most, most)}:
        found: list[Draft] = []
        for first in (False, True):
            state = SamplingState(params)
            session = opened(drafter, state, golden.vocab)
            assert isinstance(session, DraftsInPart)
            session.observe(([0] * 13,), taps)
            anchor = mx.array([5], dtype=mx.int32)
            if first:
                found.append(session.propose_first(anchor, width, count, state))
                assert found[-1].width == count
            else:
                found.append(session.propose(anchor, width, state).first(count))
        whole, part = found
        assert whole.tokens.tolist() == part.tokens.tolist()
        assert (whole.law, whole.filled, whole.width) == (
            part.law, part.filled, part.width
        )  # fmt: skip
        for one, other in ((whole.probs, part.probs), (whole.candidates, part.candidates)):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert bool(mx.array_equal(one, other))


class Counting:
    """Counts the rows that go through a layer or a function."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.rows: list[int] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.rows.append(x.shape[1])
        found: mx.array = self.inner(x)
        return found


def watch(module: Any, name: str) -> Counting:
    """Put a counter in place of a layer or a method of an object."""
    counter = Counting(getattr(module, name))
    if isinstance(module, nn.Module):
        module.pop(name, None)
    object.__setattr__(module, name, counter)
    return counter


@pytest.mark.parametrize("choice", ["off", "packed"])
@pytest.mark.parametrize(("draft", "verify"), [(4, 4), (4, 1), (3, 2)])
def test_a_generation_projects_each_token_once_and_reads_out_what_it_verifies(
    draft: int, verify: int, choice: str, tmp_path: Path
) -> None:
    """Rows through `fc`: every token of the text once, as far as it was committed when the last
    draft was asked for. Rows through the head: the drafts that were verified, no anchor, no slot
    beyond. Rows through the last layer's output projection: the same."""
    model, count = fakes.model("attention"), 40
    folder = fakes.write_dflash(tmp_path / "draft", num_hidden_layers=2)
    drafter = DFlashDrafter(folder)

    def configure(builder: Any) -> Any:
        return builder.width("fixed", tokens=draft, verify=verify).kernels({OPERATION: choice})

    with fakes.pipeline_of(drafter, target=model, configure=configure) as pipeline:
        loaded: Any = drafter._loaded
        timed = watch(loaded.target, "head")
        time_stages("it", pipeline, [EncodedPrompt("one", fakes.PROMPT)], 12)
        assert max(timed.rows) == verify  # the benchmark's clock changes nothing of it
        loaded.target.head = timed.inner
        projected = watch(loaded.network, "fc")
        outputs = watch(loaded.network.layers[-1].self_attn, "o_proj")
        others = watch(loaded.network.layers[0].self_attn, "o_proj")
        read = watch(loaded.target, "head")
        result = pipeline.generate(fakes.PROMPT, max_tokens=count)
    assert result.token_ids == fakes.plain(model, fakes.PROMPT, count)
    stats = result.stats
    asked = len(read.rows)
    assert asked > 5
    assert max(read.rows) == verify  # fewer where the text ends
    assert outputs.rows == read.rows
    assert sum(read.rows) == stats.verified
    assert stats.drafted == draft * asked
    assert set(others.rows) == {draft + 1}
    last = result.token_ids[-1:]
    committed = len(fakes.PROMPT) + len(result.token_ids) - len(last)
    assert committed - (verify + 1) <= sum(projected.rows) <= committed
    assert len(projected.rows) == asked


@pytest.mark.parametrize("rollback", ["auto", "snapshot"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", ["hybrid", "attention"])
def test_texts_are_the_same_with_every_packing(
    family: str, temperature: float, rollback: str, tmp_path: Path
) -> None:
    """Target and drafter packed or not, drawn with one seed or greedy; greedy is mlx-lm's own."""
    model, found = fakes.model(family), []
    folder = fakes.write_dflash(tmp_path / "draft", num_hidden_layers=2)
    for target, drafter in (("off", "off"), ("packed", "packed"), ("off", "context")):
        kernels = {"packed-projections": target, OPERATION: drafter}

        def configure(builder: Any, kernels: Any = kernels) -> Any:
            return builder.width("fixed", tokens=4, verify=3).kernels(kernels).rollback(rollback)

        made = DFlashDrafter(folder)
        with fakes.pipeline_of(made, target=model, configure=configure) as pipeline:
            result = pipeline.generate(
                fakes.PROMPT, max_tokens=30, temperature=temperature, seed=11
            )
        found.append((result.token_ids, result.stats.drafted, result.stats.verified))
    assert found[0] == found[1] == found[2]
    if not temperature:
        assert found[0][0] == fakes.plain(model, fakes.PROMPT, 30)


def test_a_cascade_passes_it_on() -> None:
    class Session:
        def __init__(self) -> None:
            self.asked: list[tuple[int, ...]] = []

        def observe(self, committed: Any, features: Any) -> None: ...

        def propose(self, anchor: mx.array, width: int, sampling: Any) -> Draft:
            self.asked.append((width,))
            return Draft.deterministic(mx.zeros((1, width)))

        def propose_first(
            self, anchor: mx.array, width: int, count: int, sampling: Any
        ) -> Draft:  # fmt: skip
            self.asked.append((width, count))
            return Draft.deterministic(mx.zeros((1, count)))

    class Block:
        info = DFlashDrafter.info

        def __init__(self) -> None:
            self.session = Session()

        def open(self, request: Any) -> Session:
            return self.session

    block, state = Block(), SamplingState(GREEDY)
    session: Any = CascadeDrafter([PromptLookupDrafter(), block]).open(
        DraftRequest(((1, 2),), state, VOCAB)
    )
    session.observe(((1, 2, 3),), None)
    assert session.propose_first(mx.array([9]), 7, 3, state).width == 3
    assert session.propose(mx.array([9]), 7, state).width == 7
    assert block.session.asked == [(7, 3), (7,)]
    session.observe(((4, 5, 6, 7, 4, 5),), None)
    found = session.propose_first(mx.array([6]), 7, 2, state)
    assert found.first(2).tokens.tolist() == [[7, 4]]
    assert len(block.session.asked) == 2


# --- the context grows in place ---------------------------------------------------------------


def addresses(session: Any) -> list[int]:
    """Where the buffers of all layers lie."""
    buffers = [buffer for entry in session._context._cache for buffer in entry.arrays]
    return [int(np.array(buffer, copy=False).__array_interface__["data"][0]) for buffer in buffers]


@pytest.mark.parametrize("choice", ["off", "packed"])
@pytest.mark.parametrize("window", [0, 300])
def test_a_context_grows_in_place(window: int, choice: str, tmp_path: Path) -> None:
    """Buffers move when they grow, once in `STEP` rows, and at no other time: appended rows and the
    rows of a block are written into them. No second set of buffers is alive in between."""
    folder = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=2, head_dim=64
    )
    state = SamplingState(GREEDY)
    drafter = bound(folder, FakeTarget(), choice, window=window)
    session, width, cycles, rows = opened(drafter, state), 7, 230, 3
    taps = mx.array(features(1, rows))
    places, sizes, held = [], [], []
    gc.collect()  # what other tests left would be freed on the way
    for _ in range(cycles):
        session.observe(([0] * rows,), taps)
        mx.eval(session.propose(mx.array([3]), width, state).tokens)
        places.append(tuple(addresses(session)))
        sizes.append(session._context._cache[0].rows)
        mx.synchronize()  # MLX's own thread lets go of what it was given a moment later
        held.append(mx.get_active_memory() - session.memory()["context"])
    moves = [i for i in range(1, cycles) if places[i] != places[i - 1]]
    grown = [i for i in range(1, cycles) if sizes[i] != sizes[i - 1]]
    assert moves == grown
    assert len(set(places[0])) == 4
    if window:  # its ring, its sinks, and the block behind them
        assert sizes[-1] == window + 64 + width + 1
        assert len(grown) == 1
    else:
        assert set(sizes) == {STEP, 2 * STEP, 3 * STEP}
        assert len(grown) == 2
    assert max(held) - min(held) < session.memory()["context"] / 4


@pytest.mark.parametrize("choice", ["off", "packed"])
def test_in_a_generation_too(choice: str, tmp_path: Path) -> None:
    """Through the engine: launches, verification and rollback in between keep no buffer."""
    model, sessions, places = fakes.model("hybrid"), [], []
    drafter = DFlashDrafter(fakes.write_dflash(tmp_path / "draft", num_hidden_layers=2))
    begin = drafter.open

    def opens(request: DraftRequest) -> Any:
        sessions.append(begin(request))
        return sessions[-1]

    drafter.open = opens  # type: ignore[method-assign]

    def configure(builder: Any) -> Any:
        return builder.width(4).kernels({OPERATION: choice, "packed-projections": choice})

    with fakes.pipeline_of(drafter, target=model, configure=configure) as pipeline:
        pipeline.generate(
            fakes.PROMPT, max_tokens=30, on_cycle=lambda e: places.append(addresses(sessions[0]))
        )
    assert len(places) > 20
    assert len({tuple(found) for found in places if found}) == 1


def test_an_old_buffer_that_is_kept_would_be_noticed(tmp_path: Path) -> None:
    """The test above can fail: with a reference to the buffers every cycle copies them."""
    folder = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=2
    )
    state = SamplingState(GREEDY)
    session = opened(bound(folder, FakeTarget()), state)
    moved = 0
    for _ in range(4):
        before = addresses(session)
        kept = [b[..., :1, :] for entry in session._context._cache for b in entry.arrays]
        mx.eval(kept)
        session.observe(([0] * 3,), mx.array(features(1, 3)))
        mx.eval(session.propose(mx.array([3]), 7, state).tokens)
        moved += bool(before) and before != addresses(session)
    assert moved == 3


def test_the_network_alone_gives_the_rows_it_is_asked_for(tmp_path: Path) -> None:
    folder = dflash_checkpoint(
        tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4), num_hidden_layers=2, is_causal=True
    )
    network: DFlashModel = bound(folder, FakeTarget())._loaded.network
    cache = network.make_cache()
    network.extend(mx.array(features(1, 5)), cache)
    block = mx.random.normal((1, 8, HIDDEN))
    whole = network(block, cache)
    for rows in (slice(1, 8), slice(0, 3), slice(1, 2), slice(None)):
        assert bool(mx.array_equal(network(block, cache, rows), whole[:, rows]))


@pytest.mark.parametrize("choice", ["off", "packed"])
def test_a_simulated_drafter_is_packed_as_any(choice: str, tmp_path: Path) -> None:
    folder = dflash_checkpoint(tmp_path, hidden=HIDDEN, vocab=VOCAB, taps=(1, 3, 4))
    drafter = SimulatedDFlash(folder)
    unused: Any = None
    kernels = KernelSettings.of({OPERATION: choice})
    drafter.bind(BindContext(FakeTarget(), "float32", unused, unused, kernels))  # type: ignore[arg-type]
    assert (drafter._loaded.network.packed_context is None) == (choice == "off")  # type: ignore[union-attr]
