"""DFlash 2 against an independent NumPy implementation of its description: hidden states and logits
behind the convolutions, the walk over candidates, and the law of a drawn walk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from draftloom import PipelineBuilder
from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import DraftLaw
from draftloom.drafters.dflash import BlockContext
from draftloom.drafters.dflash2 import DFlash2Drafter
from draftloom.errors import ModelError
from draftloom.pipeline import GenerateOptions
from draftloom.plugins import PluginManager
from draftloom.sampling import SamplingParams, SamplingState
from tests.parity.test_formats import SLIDING, SORTED, TOLERANCE, FakeTarget, opened, taps_of
from tests.support import models, pipelines
from tests.support.checkpoints import Golden, rewrite, write
from tests.support.dflash2_numpy import DFlash2Reference
from tests.support.oracle import greedy_trace
from tests.support.statistics import chi_square, filtered_law

CASES: dict[str, tuple[str, Golden]] = {
    "z-lab": ("z-lab-new", Golden(convolution=(3, 8))),
    "z-lab-one-tap": ("z-lab-new", Golden(convolution=(1, 32), selector=(3, 2))),
    "z-lab-more-taps-than-slots": ("z-lab-new", Golden(convolution=(9, 1))),
    "z-lab-one-candidate": ("z-lab-new", Golden(convolution=(2, 4), selector=(3, 1))),
    "z-lab-every-token": ("z-lab-new", Golden(convolution=(2, 4), selector=(5, 40))),
    "z-lab-factors": (
        "z-lab-new", Golden(convolution=(4, 16), scale=5.5, multiplier=0.3),
    ),
    "z-lab-sliding-both-ways": (
        "z-lab-new", Golden(convolution=(3, 8), config=SLIDING, causal=False),
    ),
    "speculators": ("speculators", Golden(convolution=(3, 8))),
    "speculators-sliding": (
        "speculators",
        Golden(convolution=(2, 8), config=SLIDING, from_anchor=True, causal=False),
    ),
    "speculators-reduced": ("speculators", Golden(convolution=(3, 8), draft_ids=SORTED)),
}  # fmt: skip
GREEDY = SamplingState(SamplingParams())


def rows_of(golden: Golden, exact: DFlash2Reference, target: FakeTarget, anchor: int, width: int,
            taps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Hidden states and logits of the slots, by the reference."""
    hidden = exact.slots(anchor, width, taps[0], target.embedding)
    return hidden, exact.logits(anchor, width, taps[0], target.embedding, target.weight)


def ids_of(golden: Golden) -> np.ndarray:
    return np.array(golden.draft_ids or range(golden.vocab))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_walk_equal_the_reference(name: str, tmp_path: Path) -> None:
    form, golden = CASES[name]
    target, exact, ids = FakeTarget(golden), golden.reference(), ids_of(golden)
    assert isinstance(exact, DFlash2Reference)
    folder, decided = write(tmp_path, form, golden), 0
    drafter, _ = opened(folder, target, GREEDY)
    assert isinstance(drafter, DFlash2Drafter)
    described: DrafterDescription = drafter.description
    assert described.unread == ()
    assert (drafter.info.law, drafter.info.max_width) == (DraftLaw.TOP_K, golden.block - 1)
    for context, width in [(1, 1), (3, 7), (24, 7), (40, 4)]:
        taps, anchor = taps_of(golden, context), (7 * context) % golden.vocab
        first = mx.array([anchor], dtype=mx.int32)
        inner = BlockContext(drafter._loaded)
        inner.observe(([0] * context,), mx.array(taps))
        found = np.array(drafter._loaded.scores(inner.hidden(first, width)))[0]
        hidden, logits = rows_of(golden, exact, target, anchor, width, taps)
        assert np.abs(found - logits).max() < TOLERANCE * np.abs(logits).max()

        _, session = opened(folder, target, GREEDY)
        session.observe(([0] * context,), mx.array(taps))
        draft = session.propose(first, width, GREEDY)
        assert draft.healthy.tolist() == [True]
        assert (draft.law, draft.probs) == (DraftLaw.DETERMINISTIC, None)
        tokens = draft.tokens.tolist()[0]
        for slot, previous in enumerate([anchor, *tokens[:-1]]):
            best = exact.candidates(logits[slot])
            scores = exact.scores(hidden[slot], logits[slot][best], previous, ids[best])
            ordered = np.sort(scores)
            if len(scores) == 1 or ordered[-1] - ordered[-2] > 1e-3:
                assert tokens[slot] == ids[best][scores.argmax()], (context, slot)
                decided += 1
    assert decided > 12, "the case decides nothing"


def test_the_walk_is_not_the_argmax_of_the_logits(tmp_path: Path) -> None:
    """And the convolutions see the slots before: both change what is drafted."""
    golden = Golden(convolution=(3, 8))
    target, exact = FakeTarget(golden), golden.reference()
    taps = taps_of(golden, 9)
    hidden, logits = rows_of(golden, exact, target, 4, 7, taps)  # type: ignore[arg-type]
    _, session = opened(write(tmp_path, "z-lab-new", golden), target, GREEDY)
    session.observe(([0] * 9,), mx.array(taps))
    tokens = session.propose(mx.array([4], dtype=mx.int32), 7, GREEDY).tokens.tolist()[0]
    assert tokens != logits.argmax(-1).tolist()
    plain = Golden(convolution=(1, 8)).reference()
    plain.weights.update(exact.weights)
    for key, value in exact.weights.items():
        if "base_kernel" in key:
            plain.weights[key] = value[:, :1]
        if "kernel_projection" in key:
            plain.weights[key] = value.reshape(2, 3, -1, 32)[:, :1].reshape(-1, 32)
    assert np.abs(plain.slots(4, 7, taps[0], target.embedding) - hidden).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_a_drawn_walk_carries_its_law(name: str, tmp_path: Path) -> None:
    """q over the candidates of each slot, given the token drawn before; nothing elsewhere."""
    form, golden = CASES[name]
    target, exact, ids = FakeTarget(golden), golden.reference(), ids_of(golden)
    assert isinstance(exact, DFlash2Reference)
    state = SamplingState(SamplingParams(temperature=2.5, seed=4))
    _, session = opened(write(tmp_path, form, golden), target, state)
    taps, anchor, width, texts = taps_of(golden, 9), 11, 5, set()
    session.observe(([0] * 9,), mx.array(taps))
    hidden, logits = rows_of(golden, exact, target, anchor, width, taps)
    for _ in range(6):
        draft = session.propose(mx.array([anchor], dtype=mx.int32), width, state)
        assert draft.law is DraftLaw.TOP_K
        assert draft.probs.shape == draft.candidates.shape == (1, width, golden.selector[1])
        tokens = draft.tokens.tolist()[0]
        for slot, previous in enumerate([anchor, *tokens[:-1]]):
            best = exact.candidates(logits[slot])
            scores = exact.scores(hidden[slot], logits[slot][best], previous, ids[best]) / 2.5
            odds = np.exp(scores - scores.max())
            wanted = dict(zip(ids[best].tolist(), odds / odds.sum(), strict=True))
            found = dict(
                zip(draft.candidates[0, slot].tolist(), draft.probs[0, slot].tolist(), strict=True)
            )
            assert found == pytest.approx(wanted, abs=1e-4)
            assert found[tokens[slot]] > 0
        texts.add(tuple(tokens))
    assert len(texts) > 1 or golden.selector[1] == 1, "nothing was drawn"


def test_draws_follow_the_law_that_is_reported(tmp_path: Path) -> None:
    """4000 rows of one batch, two slots of three candidates: chi-square over the nine walks."""
    golden, rows = Golden(convolution=(2, 8), selector=(6, 3), seed=2), 4000
    target, exact = FakeTarget(golden), golden.reference()
    assert isinstance(exact, DFlash2Reference)
    state = SamplingState(SamplingParams(temperature=15.0, seed=7))
    _, session = opened(write(tmp_path, "z-lab-new", golden), target, state)
    taps = taps_of(golden, 5)
    session.observe(([0] * 5,) * rows, mx.array(np.repeat(taps, rows, axis=0)))
    draft = session.propose(mx.array([3] * rows, dtype=mx.int32), 2, state)
    hidden, logits = rows_of(golden, exact, target, 3, 2, taps)
    law: dict[tuple[int, int], float] = {}

    def softmax(scores: np.ndarray) -> np.ndarray:
        odds = np.exp((scores - scores.max()) / 15.0)
        return odds / odds.sum()

    first, second = exact.candidates(logits[0]), exact.candidates(logits[1])
    start = softmax(exact.scores(hidden[0], logits[0][first], 3, first))
    for token, share in zip(first.tolist(), start, strict=True):
        follow = softmax(exact.scores(hidden[1], logits[1][second], token, second))
        law |= {(token, int(n)): share * f for n, f in zip(second, follow, strict=True)}
    pairs = [tuple(pair) for pair in draft.tokens.tolist()]
    assert min(law.values()) * rows > 5, "too rare to tell"
    assert chi_square(pairs, law) > 1e-4
    uneven = max(abs(share - 1 / 9) for share in law.values())
    assert uneven > 0.05, "an even law would pass whatever is drawn"


@pytest.mark.parametrize("policy", ["speculative-sampling", "block-verification"])
def test_a_sparse_law_is_lossless(policy: str, tmp_path: Path) -> None:
    """The first two tokens emitted after 6000 drawn walks follow the target's law, though q is zero
    for all but three tokens."""
    golden, rows = Golden(vocab=9, convolution=(2, 8), selector=(6, 3), seed=2), 6000
    state = SamplingState(SamplingParams(temperature=15.0, seed=11))
    _, session = opened(write(tmp_path, "z-lab-new", golden), FakeTarget(golden), state)
    session.observe(([0] * 5,) * rows, mx.array(np.repeat(taps_of(golden, 5), rows, axis=0)))
    draft = session.propose(mx.array([3] * rows, dtype=mx.int32), 2, state)
    table = 15 * np.random.default_rng(8).standard_normal((9, 9)).astype(np.float32)
    block = np.concatenate([np.full((rows, 1), 3), np.array(draft.tokens)], axis=1)
    component = PluginManager(entry_points=False).component("acceptance", policy)
    accepted, following = component.make({}).accept(draft, mx.array(table[block]), state)
    kept, after, tokens = accepted.tolist(), following.tolist(), draft.tokens.tolist()
    laws = [filtered_law(row, temperature=15.0) for row in table]
    rng, pairs = np.random.default_rng(2), []
    for row, count, token in zip(tokens, kept, after, strict=True):
        text = [*row[:count], token]
        if len(text) == 1:  # the next cycle goes on with the target's law
            text.append(int(rng.choice(9, p=laws[text[0]])))
        pairs.append(tuple(text[:2]))
    law = {(i, j): laws[3][i] * laws[i][j] for i in range(9) for j in range(9)}
    assert chi_square(pairs, law) > 1e-4
    assert 200 < sum(count == 2 for count in kept) < 5800
    drawn = [row[0] for row in tokens]
    assert len({*drawn}) == 3
    first = dict(enumerate(laws[3]))
    assert chi_square(drawn, first) < 1e-9, "q is p: the case decides nothing"


# --- whole generations ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::draftloom.errors.DrafterMismatchWarning")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5-v2"])
@pytest.mark.parametrize(("form", "options"), [
    ("z-lab-new", {}), ("z-lab-new", {"window": 4, "sinks": 2}), ("z-lab-new", {"bits": 4}),
    ("speculators", {}),
])  # fmt: skip
def test_greedy_text_is_that_of_plain_mlx_lm(
    form: str, options: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """Found by its folder alone; windowed and packed as well."""
    golden = Golden(
        vocab=models.VOCAB, hidden=models.HIDDEN, taps=(0, 2), convolution=(3, 8),
        config={"intermediate_size": 64},
    )  # fmt: skip
    folder, prompt = write(tmp_path / "drafter", form, golden), (3, 1, 4, 1, 5, 9, 2, 6)
    trace = greedy_trace(family, prompt, 20)
    builder: PipelineBuilder = pipelines.builder(models.build(family)).drafter(str(folder))
    with builder.drafter_options(**options).build() as pipeline:
        assert pipeline.names["drafter"] == "dflash2"
        engine = pipeline.engine(prompt, GenerateOptions(max_tokens=20))
        text = tuple(t for event in engine.cycles() for t in event.token_ids)
        assert not engine.stats.fell_back
        assert engine.stats.drafted > 20
    assert text == trace.tokens[len(prompt) : len(prompt) + 20]
    assert not trace.differences(engine.cache, len(prompt) + 19)


def test_windows_and_convolutions_together(tmp_path: Path) -> None:
    """The window drops context, never the block's own rows, which the convolutions read."""
    golden = Golden(convolution=(3, 8))
    target, exact = FakeTarget(golden), golden.reference()
    exact.window, exact.sinks = 5, 2
    drafter, _ = opened(write(tmp_path, "z-lab-new", golden), target, GREEDY, window=5, sinks=2)
    inner, taps = BlockContext(drafter._loaded), taps_of(golden, 30)
    for start in range(0, 30, 6):
        inner.observe(([0] * 6,), mx.array(taps[:, start : start + 6]))
    found = np.array(inner.hidden(mx.array([4], dtype=mx.int32), 7))[0]
    wanted = exact.slots(4, 7, taps[0], target.embedding)
    assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("window", [0, 5])
def test_it_says_what_it_holds(window: int, tmp_path: Path) -> None:
    """Weights, and a context that is what was foretold."""
    golden = Golden(convolution=(3, 8))
    options = {"window": window, "sinks": 0}
    drafter, session = opened(
        write(tmp_path, "z-lab-new", golden), FakeTarget(golden), GREEDY, **options
    )
    weights = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(weights, dict)
    assert drafter.memory() == {"weights": sum(value.nbytes for value in weights.values())}
    session.observe(([0] * 40,), mx.array(taps_of(golden, 40)))
    mx.eval(session.propose(mx.array([4], dtype=mx.int32), 7, GREEDY).tokens)
    rows = (window + 8) if window else 256
    held = 2 * golden.network["num_key_value_heads"] * 8 * 4 * 2 * rows
    assert session.memory() == {"context": held, "features": 0}
    assert held <= drafter.context_bytes(40) <= 1.3 * held


# --- what does not fit ------------------------------------------------------------------------


def drop(config: dict[str, Any], key: str) -> None:
    del config["dflash_config"][key]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: drop(c, "selector_rank"), "lacks selector_rank"),
        (lambda c: drop(c, "selector_top_k"), "lacks selector_top_k"),
        (lambda c: drop(c, "conv_kernel_size"), "lacks conv_kernel_size"),
        (lambda c: drop(c, "conv_group_size"), "lacks conv_group_size"),
        (
            lambda c: c["dflash_config"].update(conv_group_size=5),
            "conv_group_size 5 does not divide hidden_size 32",
        ),
        (
            lambda c: c["dflash_config"].update(selector_top_k=41),
            "selector_top_k 41 is above the 40 tokens",
        ),
    ],
)
def test_configs_that_do_not_fit_name_the_key(
    change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "z-lab-new", Golden(convolution=(3, 8)))
    rewrite(folder, config=change)
    with pytest.raises(ModelError, match=says) as caught:
        DFlash2Drafter(folder)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.pop("layers.1.mlp_conv.base_kernel"),
            r"layers\.1\.mlp_conv\.base_kernel missing",
        ),
        (
            lambda t: t.pop("candidate_selector.successor_codebook"),
            r"candidate_selector\.successor_codebook missing",
        ),
        (
            lambda t: t.update({"candidate_selector.predecessor_codebook": mx.zeros((39, 6))}),
            r"predecessor_codebook is \(39, 6\), not \(40, 6\)",
        ),
        (
            lambda t: t.update({"layers.0.attention_conv.base_kernel": mx.zeros((2, 4, 32))}),
            r"attention_conv\.base_kernel is \(2, 4, 32\), not \(2, 3, 32\)",
        ),
        (
            lambda t: t.update({"layers.0.extra_conv.base_kernel": mx.zeros((2, 3, 32))}),
            r"does not know tensor layers\.0\.extra_conv\.base_kernel",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(
    change: Callable[[dict[str, mx.array]], Any], says: str, tmp_path: Path
) -> None:
    golden = Golden(convolution=(3, 8))
    folder = rewrite(write(tmp_path, "z-lab-new", golden), tensors=change)
    with pytest.raises(ModelError, match=says) as caught:
        opened(folder, FakeTarget(golden), GREEDY)
    assert str(tmp_path) in str(caught.value)


def test_a_checkpoint_of_another_drafter_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "z-lab-new", Golden())
    with pytest.raises(ModelError, match="for the drafter 'dflash', not for 'dflash2'"):
        DFlash2Drafter(folder)


def test_numbers_that_are_not_finite_are_reported_by_the_draft(tmp_path: Path) -> None:
    golden = Golden(convolution=(3, 8))
    _, session = opened(write(tmp_path, "z-lab-new", golden), FakeTarget(golden), GREEDY)
    taps = np.repeat(taps_of(golden, 4), 2, axis=0)
    taps[1, 2, 5] = np.nan
    session.observe(([0] * 4,) * 2, mx.array(taps))
    draft = session.propose(mx.array([1, 2], dtype=mx.int32), 3, GREEDY)
    assert draft.healthy.tolist() == [True, False]
