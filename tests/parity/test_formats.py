"""Every checkpoint format against an independent NumPy implementation of what was written.

`tests.support.checkpoints` writes one drafter in each format by hand; the reference never sees the
files. Logits agree within 2e-5 of their size (float32 against float64).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from draftloom.abilities import BindContext
from draftloom.checkpoint import DrafterDescription
from draftloom.contracts import CacheKind, DraftLaw, DraftRequest, TargetInfo
from draftloom.drafters.dflash import BlockContext
from draftloom.model_info import ModelInfo
from draftloom.pipeline import GenerateOptions
from draftloom.plugins import PluginManager
from draftloom.sampling import SamplingParams, SamplingState
from tests.support import families_more, models, pipelines
from tests.support.checkpoints import Golden, write
from tests.support.dflash_numpy import DSparkReference
from tests.support.oracle import greedy_trace

TOLERANCE = 2e-5
SLIDING: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
NARROW = {**SLIDING, "sliding_window": 2}
YARN = {
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip
IDS = tuple(int(i) for i in np.random.default_rng(5).permutation(40)[:17])
SORTED = tuple(sorted(IDS))
CASES: dict[str, tuple[str, Golden]] = {
    "z-lab-old": ("z-lab-old", Golden()),
    "z-lab-old-yarn": ("z-lab-old", Golden(config=YARN)),
    "z-lab-old-sliding": ("z-lab-old", Golden(config=SLIDING)),
    "z-lab-old-all-causal": ("z-lab-old", Golden(causal=True)),
    "z-lab-new-factors": (
        "z-lab-new", Golden(scale=5.5, multiplier=0.3, softcap=3.0),
    ),
    "z-lab-new-yarn": ("z-lab-new", Golden(config=YARN)),
    "z-lab-new-sliding-not-causal": ("z-lab-new", Golden(config=SLIDING, causal=False)),
    "specforge": ("specforge", Golden(config=SLIDING)),
    "specforge-dspark": ("specforge", Golden(first_slot=0, markov="vanilla", confidence=True)),
    "specforge-dspark-gated": ("specforge", Golden(first_slot=0, markov="gated")),
    "speculators": ("speculators", Golden()),
    "speculators-yarn": ("speculators", Golden(config=YARN)),
    "speculators-sliding": ("speculators", Golden(config=SLIDING, from_anchor=True)),
    "speculators-narrow-not-causal": (
        "speculators", Golden(config=NARROW, from_anchor=True, causal=False),
    ),
    "speculators-reduced": ("speculators", Golden(draft_ids=SORTED)),
    "speculators-from-anchor": ("speculators", Golden(first_slot=0)),
    "speculators-dspark-reduced": (
        "speculators",
        Golden(first_slot=0, draft_ids=SORTED, markov="vanilla", confidence=False),
    ),
    "speculators-dspark-after-anchor": (
        "speculators", Golden(first_slot=1, markov="rnn", confidence=True),
    ),
    "dspark": ("dspark", Golden(first_slot=0, markov="vanilla", confidence=True)),
    "dspark-interleaved-causal": (
        "dspark",
        Golden(
            first_slot=0, markov="vanilla", causal=True, config={"rope_is_neox_style": False},
        ),
    ),
    "dspark-after-anchor": ("dspark", Golden(markov="vanilla")),
    "dspark-own-parts": (
        "dspark",
        Golden(
            first_slot=0, markov="gated", confidence=True, softcap=2.0,
            own=("embed_tokens", "lm_head"),
        ),
    ),
    "dspark-reduced-rnn": (
        "dspark", Golden(first_slot=0, markov="rnn", draft_ids=IDS, config=SLIDING),
    ),
}  # fmt: skip
SPARK = [name for name, (_, golden) in CASES.items() if golden.markov]
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temperature=0.8, seed=4)


class FakeTarget:
    """Embedding and head of a target, and nothing else."""

    def __init__(self, golden: Golden) -> None:
        rng = np.random.default_rng(3)
        shape = (golden.vocab, golden.hidden)
        self.embedding = rng.standard_normal(shape).astype(np.float32)
        self.weight = rng.standard_normal(shape).astype(np.float32)
        kinds = (CacheKind.ATTENTION,)
        self.info = TargetInfo("fake", "fake", "fake", golden.hidden, golden.vocab, 6, kinds)

    def embed(self, tokens: mx.array) -> mx.array:
        return mx.array(self.embedding)[tokens]

    def head(self, hidden: mx.array) -> mx.array:
        return hidden @ mx.array(self.weight).T


def opened(folder: Path, target: Any, sampling: SamplingState, **options: Any) -> tuple[Any, Any]:
    """The drafter that the description names, bound, and a session of it."""
    manager = PluginManager(entry_points=False)
    description = manager.describe_checkpoint(ModelInfo.from_path(folder))
    assert description is not None
    component = manager.component("drafter", description.drafter)
    drafter = component.make({"checkpoint": description, **options})
    assert not list(drafter.check(target.info))
    drafter.bind(BindContext(target, "float32", lambda path: None, lambda target: None))  # type: ignore[arg-type, return-value]
    request = DraftRequest(((0,),), sampling, target.info.vocab_size)
    return drafter, drafter.open(request)


def taps_of(golden: Golden, tokens: int) -> np.ndarray:
    shape = (1, tokens, len(golden.taps) * golden.hidden)
    return np.random.default_rng(tokens).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_draft_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    form, golden = CASES[name]
    target, exact = FakeTarget(golden), golden.reference()
    state = SamplingState(GREEDY)
    drafter, _ = opened(write(tmp_path, form, golden), target, state)
    described: DrafterDescription = drafter.description
    assert described.tap_layers == golden.taps
    assert drafter.info.max_width == described.max_width == golden.block - golden.first_slot
    assert described.unread == ()
    widest = golden.block - golden.first_slot
    decided = 0
    for context, width in [(1, 1), (3, widest), (24, widest), (40, 4)]:
        taps, anchor = taps_of(golden, context), (7 * context) % golden.vocab
        features, first = mx.array(taps), mx.array([anchor], dtype=mx.int32)
        inner = BlockContext(drafter._loaded)
        inner.observe(([0] * context,), features)
        found = np.array(drafter._loaded.scores(inner.hidden(first, width)))[0]
        wanted = exact.logits(anchor, width, taps[0], target.embedding, target.weight)
        if golden.softcap and not golden.own:  # the target's head caps by itself
            wanted = golden.softcap * np.arctanh(wanted / golden.softcap)
        assert found.shape == wanted.shape == (width, golden.words)
        assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()

        again = drafter.open(DraftRequest(((0,),), state, golden.vocab))
        again.observe(([0] * context,), features)
        draft = again.propose(first, width, state)
        tokens = draft.tokens.tolist()[0]
        assert draft.healthy.tolist() == [True]
        assert (draft.law, draft.lengths) == (DraftLaw.DETERMINISTIC, None)
        rows = wanted
        if isinstance(exact, DSparkReference):
            hidden = exact.slots(anchor, width, taps[0], target.embedding)
            rows, _ = exact.walk(wanted, hidden, [anchor, *tokens[:-1]])
        ids = np.array(golden.draft_ids or range(golden.vocab))
        best = np.sort(rows, axis=-1)
        clear = best[:, -1] - best[:, -2] > 10 * TOLERANCE * np.abs(best).max()
        assert np.array_equal(np.array(tokens)[clear], ids[rows.argmax(-1)][clear])
        decided += int(clear.sum())
    assert decided > widest, "the case decides nothing"


@pytest.mark.parametrize("name", SPARK)
def test_sampled_drafts_carry_the_law_they_were_drawn_from(name: str, tmp_path: Path) -> None:
    """q over the target's vocabulary, zero where the drafter has no token; and every token is one
    that q allows."""
    form, golden = CASES[name]
    target, exact = FakeTarget(golden), golden.reference()
    assert isinstance(exact, DSparkReference)
    state = SamplingState(SAMPLED)
    _, session = opened(write(tmp_path, form, golden), target, state)
    taps, anchor, width = taps_of(golden, 9), 11, 5
    session.observe(([0] * 9,), mx.array(taps))
    base = exact.logits(anchor, width, taps[0], target.embedding, target.weight)
    hidden = exact.slots(anchor, width, taps[0], target.embedding)
    ids, texts = np.array(golden.draft_ids or range(golden.vocab)), set()
    for _ in range(6):
        draft = session.propose(mx.array([anchor], dtype=mx.int32), width, state)
        tokens = draft.tokens.tolist()[0]
        rows, _ = exact.walk(base, hidden, [anchor, *tokens[:-1]])
        odds = np.exp((rows - rows.max(-1, keepdims=True)) / 0.8)
        law = np.zeros((width, golden.vocab))
        law[:, ids] = odds / odds.sum(-1, keepdims=True)
        assert draft.law is DraftLaw.DENSE
        assert np.abs(np.array(draft.probs)[0] - law).max() < 1e-4
        outside = np.setdiff1d(np.arange(golden.vocab), ids)
        assert (np.array(draft.probs)[0][:, outside] == 0).all()
        assert all(law[i, token] > 0 for i, token in enumerate(tokens))
        texts.add(tuple(tokens))
    assert len(texts) > 1, "nothing was drawn"


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("name", [n for n in SPARK if CASES[n][1].confidence is not None])
def test_the_cut_is_where_the_product_of_confidences_falls(
    name: str, params: SamplingParams, tmp_path: Path
) -> None:
    """It depends on the tokens before a slot only: the reference is not told the slot's own."""
    form, golden = CASES[name]
    target, exact = FakeTarget(golden), golden.reference()
    assert isinstance(exact, DSparkReference)
    state, folder = SamplingState(params), write(tmp_path, form, golden)
    taps, width, lengths = taps_of(golden, 9), 6, set()
    for anchor, threshold in itertools.product(range(8), (0.02, 0.2, 0.6)):
        _, session = opened(folder, target, state, confidence_threshold=threshold)
        session.observe(([0] * 9,), mx.array(taps))
        draft = session.propose(mx.array([anchor], dtype=mx.int32), width, state)
        tokens = draft.tokens.tolist()[0]
        base = exact.logits(anchor, width, taps[0], target.embedding, target.weight)
        hidden = exact.slots(anchor, width, taps[0], target.embedding)
        _, confidences = exact.walk(base, hidden, [anchor, *tokens[:-1]])
        products = np.cumprod(confidences)
        kept = next((i for i, p in enumerate(products) if p < threshold), width)
        assert np.abs(products - threshold).min() > 1e-5, "too near to tell"
        assert draft.lengths.tolist() == [kept]
        assert len(tokens) == width, "the cut is lazy"
        lengths.add(kept)
    assert len(lengths) > 2, "the cut is always the same"


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "qwen3"])
@pytest.mark.parametrize("form", ["z-lab-new", "speculators", "dspark"])
def test_a_targets_own_embedding_factor_is_not_applied_twice(
    form: str, family: str, tmp_path: Path
) -> None:
    """Gemma multiplies its table by sqrt(D) itself. The scale of a z-lab file is meant for the
    table, speculators takes the table alone; without a key it is what the first layer gets."""
    gemma = family.startswith("gemma")
    model = families_more.new_model(families_more.MORE[family]) if gemma else models.build(family)
    target = pipelines.adapt(model)
    hidden, vocab = target.info.hidden_size, target.info.vocab_size
    own = hidden**0.5 if gemma else 1.0
    given = {"z-lab-new": hidden**0.5, "speculators": 1.0, "dspark": 1.0}[form]
    wanted = own if form == "dspark" else given
    markov = {"markov": "vanilla", "first_slot": 0} if form == "dspark" else {}
    golden = Golden(hidden=hidden, vocab=vocab, taps=(0, 1), scale=given, **markov)  # type: ignore[arg-type]
    drafter, _ = opened(write(tmp_path, form, golden), target, SamplingState(GREEDY))
    tokens = mx.array([[1, 5, 7]])
    (table,) = (m for n, m in model.named_modules() if n.endswith("embed_tokens"))
    rows = np.array(table(tokens)) * wanted
    found = np.array(drafter._loaded.embed(tokens))
    assert np.abs(found - rows).max() < 0.02 * np.abs(rows).max()
    target.close()


# --- whole generations ------------------------------------------------------------------------

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "z-lab-old": ("z-lab-old", {"config": SLIDING}),
    "z-lab-new": ("z-lab-new", {"config": YARN, "softcap": 3.0}),
    "specforge": ("specforge", {}),
    "specforge-dspark": ("specforge", {"first_slot": 0, "markov": "vanilla", "confidence": True}),
    "speculators": ("speculators", {"config": SLIDING, "from_anchor": True}),
    "speculators-reduced": ("speculators", {"draft_ids": True}),
    "speculators-dspark": (
        "speculators",
        {"draft_ids": True, "first_slot": 0, "markov": "vanilla", "confidence": True},
    ),
    "dspark": ("dspark", {"first_slot": 0, "markov": "gated", "confidence": False}),
}


def golden_for(family_vocab: int, hidden: int, **given: Any) -> Golden:
    if given.get("draft_ids"):
        given["draft_ids"] = tuple(range(1, family_vocab, 2))
    return Golden(vocab=family_vocab, hidden=hidden, taps=(0, 2), **given)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5-v2"])
@pytest.mark.parametrize("name", WHOLE)
def test_greedy_text_is_that_of_plain_mlx_lm(name: str, family: str, tmp_path: Path) -> None:
    form, given = WHOLE[name]
    golden = golden_for(models.VOCAB, models.HIDDEN, **given)
    folder = write(tmp_path / "drafter", form, golden)
    prompt = (3, 1, 4, 1, 5, 9, 2, 6)
    trace = greedy_trace(family, prompt, 20)
    builder = pipelines.builder(models.build(family)).drafter(str(folder))
    if golden.confidence is not None:
        builder = builder.drafter("dspark", checkpoint=str(folder), confidence_threshold=0.1)
    with builder.build() as pipeline:
        assert pipeline.names["drafter"] == ("dspark" if golden.markov else "dflash")
        engine = pipeline.engine(prompt, GenerateOptions(max_tokens=20))
        text = tuple(t for event in engine.cycles() for t in event.token_ids)
        assert not engine.stats.fell_back
        assert engine.stats.drafted > 20
    assert text == trace.tokens[len(prompt) : len(prompt) + 20]
    assert not trace.differences(engine.cache, len(prompt) + 19)
