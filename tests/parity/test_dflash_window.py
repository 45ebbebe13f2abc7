"""A drafter's context window against the reference that masks what the window drops, and greedy
texts under windows that roll over many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftloom.abilities import BindContext
from draftloom.contracts import DraftRequest
from draftloom.drafters.dflash import DFlashDrafter, model
from draftloom.drafters.dflash.context import ContextCache
from draftloom.errors import ModelError, UsageError
from draftloom.pipeline import GenerateOptions
from draftloom.sampling import SamplingParams, SamplingState
from tests.parity.test_dflash import (
    SLIDING,
    VOCAB,
    FakeTarget,
    check_draft,
    features,
    reference,
    write,
)
from tests.support import cases, models
from tests.support.cases import Case
from tests.support.oracle import greedy_trace, text_model
from tests.support.profile import examples

SAMPLING = SamplingState(SamplingParams())
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {"num_hidden_layers": 2},
    "causal": {"num_hidden_layers": 2, "is_causal": True},
    "mixed": {"num_hidden_layers": 3, "sliding_window": 6, **SLIDING},
    "mixed-not-causal": {
        "num_hidden_layers": 3, "sliding_window": 6, "is_causal": False, **SLIDING,
    },
    "one-row": {"num_hidden_layers": 3, "sliding_window": 1, **SLIDING},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("windows")
    return {name: write(base / name, **config)[0] for name, config in CONFIGS.items()}


def opened(folder: Path, target: FakeTarget, **options: Any) -> Any:
    drafter = DFlashDrafter(folder, **options)
    drafter.bind(BindContext(target, "float32", lambda path: None, lambda target: None))  # type: ignore[arg-type, return-value]
    return drafter.open(DraftRequest(((0,),), SAMPLING, VOCAB))


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_equal_the_reference_with_the_same_mask(name: str, folders: dict[str, Path]) -> None:
    """In whatever parts the context arrives, with drafts in between that leave nothing behind; and
    a layer never holds more rows than its window, its sinks and a block."""

    @examples(12, name)
    @given(
        st.integers(1, 9),
        st.integers(0, 5),
        st.lists(st.tuples(st.integers(1, 14), st.integers(1, 8)), min_size=1, max_size=6),
    )
    def check(window: int, sinks: int, parts: list[tuple[int, int]]) -> None:
        target, exact = FakeTarget(), reference(folders[name])
        exact.window, exact.sinks = window, sinks
        session = opened(folders[name], target, window=window, sinks=sinks)
        taps, start = features(1, 90), 0
        for size, width in parts:
            session.observe(([0] * size,), mx.array(taps[:, start : start + size]))
            start += size
            check_draft(session, target, exact, taps[:, :start], width)
            own = exact.config.get("sliding_window")
            for entry, kind in zip(
                session._context._cache, exact._get("layer_types", ["full_attention"] * 9),
                strict=False,
            ):  # fmt: skip
                rows = window + sinks if kind == "full_attention" else min(window, own - 1)
                assert entry.held == min(start, rows)
                widest = max(width for _, width in parts)
                assert entry.rows <= rows + widest + 1

    check()


def test_the_reference_sees_the_window(folders: dict[str, Path]) -> None:
    """Window and sinks each change what is drafted: the cases above decide something."""
    exact, taps, found = reference(folders["full"]), features(1, 40), []
    embeddings = FakeTarget().embedding[[7] + [39] * 5]
    for exact.window, exact.sinks in [(0, 0), (8, 0), (8, 2), (9, 2)]:
        found.append(exact.hidden(embeddings, taps[0]))
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("window", [1, 7, 30])
def test_parts_equal_all_at_once(window: int, folders: dict[str, Path]) -> None:
    """Bit for bit: where a position lies depends on it alone."""
    taps, target = mx.array(features(1, 61)), FakeTarget()
    anchor, hidden = mx.array([4], dtype=mx.int32), []
    for sizes in [(61,), (1,) * 61, (30, 31), (3, 17, 1, 40)]:
        session, start = opened(folders["mixed"], target, window=window, sinks=3), 0
        for size in sizes:
            session.observe(([0] * size,), taps[:, start : start + size])
            start += size
            if size != 61:
                mx.eval(session.propose(anchor, 5, SAMPLING).tokens)
        mx.eval(session.propose(anchor, 9, SAMPLING).tokens)
        hidden.append(target.hidden)
    assert all(np.array_equal(hidden[0], other) for other in hidden[1:])


def test_the_default_changes_nothing_for_short_contexts(folders: dict[str, Path]) -> None:
    """Up to 4160 positions the default window holds all of them: the same numbers, bit for bit."""
    taps, target, hidden = mx.array(features(1, 700)), FakeTarget(), []
    for options in ({}, {"window": 0}):
        session = opened(folders["full"], target, **options)
        session.observe(([0] * 700,), taps)
        mx.eval(session.propose(mx.array([4], dtype=mx.int32), 9, SAMPLING).tokens)
        hidden.append(target.hidden)
    assert np.array_equal(*hidden)


def test_the_default_bounds_the_context(folders: dict[str, Path]) -> None:
    """The first 64 and the last 4096 of 5000 positions; what is dropped is not even projected."""
    target, taps = FakeTarget(), features(1, 5000)
    taps[:, 64:904] = np.nan
    session = opened(folders["full"], target)
    session.observe(([0] * 5000,), mx.array(taps))
    draft = session.propose(mx.array([4], dtype=mx.int32), 5, SAMPLING)
    assert draft.healthy.tolist() == [True]
    assert {entry.held for entry in session._context._cache} == {4160}
    assert {entry.rows for entry in session._context._cache} == {4166}
    size = sum(entry.nbytes for entry in session._context._cache)
    assert size == 2 * 2 * 4166 * 2 * 8 * 4
    assert session.memory() == {"context": size, "features": 0}
    exact = reference(folders["full"])
    exact.window, exact.sinks = 4096, 64
    check_draft(session, target, exact, np.nan_to_num(taps), 5)


@pytest.mark.parametrize(
    ("options", "kept"), [({}, 94), ({"sinks": 0}, 30), ({"window": 8}, 72), ({"window": 0}, 200)]
)
def test_the_default_is_what_the_checkpoint_was_trained_on(
    options: dict[str, int], kept: int, tmp_path: Path
) -> None:
    """Where it states that; up to there nothing is dropped, whatever the sinks."""
    folder, exact = write(tmp_path, draftloom={"context_length": 30})
    target, taps = FakeTarget(), features(1, 200)
    session = opened(folder, target, **options)
    session.observe(([0] * 30,), mx.array(taps[:, :30]))
    if options.get("window") != 8:
        check_draft(session, target, exact, taps[:, :30], 5)
    session.observe(([0] * 170,), mx.array(taps[:, 30:]))
    mx.eval(session.propose(mx.array([4], dtype=mx.int32), 5, SAMPLING).tokens)
    assert {entry.held for entry in session._context._cache} == {kept}


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "many"])
def test_a_trained_context_of_no_use_names_the_key(value: Any, tmp_path: Path) -> None:
    folder, _ = write(tmp_path, draftloom={"context_length": value})
    with pytest.raises(ModelError, match=r"draftloom\.context_length must be a whole number"):
        DFlashDrafter(folder)


@pytest.mark.parametrize("name", ["full", "causal", "mixed"])
def test_buffers_looked_at_whole_equal_the_reference(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where attention is planned for a number of keys: free rows are masked."""
    monkeypatch.setattr(model, "on_cuda", lambda: True)
    target, exact = FakeTarget(), reference(folders[name])
    exact.window, exact.sinks = 20, 3
    session, taps = opened(folders[name], target, window=20, sinks=3), features(1, 60)
    for start in range(0, 60, 12):
        session.observe(([0] * 12,), mx.array(taps[:, start : start + 12]))
        for width in (7, 3):
            check_draft(session, target, exact, taps[:, : start + 12], width)


def test_a_sliding_layer_drops_what_it_never_sees_again(tmp_path: Path) -> None:
    """Without a window of the user's, too: its own is enough."""
    folder, exact = write(tmp_path, num_hidden_layers=3, sliding_window=7, **SLIDING)
    target, taps = FakeTarget(), features(1, 300)
    session = opened(folder, target, window=0)
    for start in range(0, 300, 50):
        session.observe(([0] * 50,), mx.array(taps[:, start : start + 50]))
        check_draft(session, target, exact, taps[:, : start + 50], 11)
    assert [entry.held for entry in session._context._cache] == [6, 300, 6]
    assert [entry.rows for entry in session._context._cache] == [18, 512, 18]


# --- inside generations ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::draftloom.errors.DrafterMismatchWarning")
@pytest.mark.parametrize("family", ["qwen3_5-v2", "qwen3"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 2), (9, 0)])
def test_a_rolling_window_changes_no_token(
    family: str, window: int, sinks: int, tmp_path: Path
) -> None:
    """Texts many windows long, then cut and gone on with, as a chat does: plain mlx-lm's tokens,
    and every draft is the reference's over the same window."""
    prompt, count = (3, 1, 4, 1, 5, 9, 2), 60
    trace, stock = greedy_trace(family, prompt, count + 30), text_model(models.stock(family))
    embedding, head = np.array(stock.model.embed_tokens.weight), np.array(stock.lm_head.weight)
    proposed: list[list[int]] = []
    builder = cases.build(Case(family, "dflash", "auto", "block", 5, prompt), tmp_path)
    with builder.drafter_options(window=window, sinks=sinks).build() as pipeline:
        listen(pipeline, proposed)
        engine = pipeline.engine(prompt, GenerateOptions(max_tokens=count, prefill_chunk=3))
        events = list(engine.cycles())
        tokens = [t for event in events for t in event.token_ids]
        assert tuple(tokens) == trace.tokens[len(prompt) : len(prompt) + count]
        assert not engine.stats.fell_back
        first = list(proposed)
        engine.cut(0)
        kept = len(prompt) + count - len(events[-1].token_ids)
        options = GenerateOptions(max_tokens=20, cache=engine.cache)
        more = pipeline.engine((trace.tokens[kept - 1],), options)
        going_on = [t for event in more.cycles() for t in event.token_ids]
        assert tuple(going_on) == trace.tokens[kept : kept + 20]
        assert not more.stats.fell_back
    counts = np.cumsum([len(prompt)] + [len(event.token_ids) for event in events])
    exact, agreeing = reference(tmp_path / "dflash"), 0
    exact.window, exact.sinks = window, sinks
    for done, drafted in zip(counts[1:], first, strict=False):
        taps = trace.taps(cases.TAPS, done - 1)
        logits = exact.logits(trace.tokens[done - 1], 4, taps, embedding, head)
        best = np.sort(logits, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-3
        assert np.array_equal(np.array(drafted)[clear], logits.argmax(-1)[clear])
        agreeing += int(clear.sum())
    assert agreeing > 60


def listen(pipeline: Any, proposed: list[list[int]]) -> None:
    """Keep what the drafter of a pipeline proposes."""
    drafter: Any = pipeline._parts.drafter
    opened = drafter.open

    def open_and_listen(request: DraftRequest) -> Any:
        session = opened(request)
        propose = session.propose

        def note(*args: Any) -> Any:
            draft = propose(*args)
            proposed.extend(draft.tokens.tolist())
            return draft

        session.propose = note
        return session

    drafter.open = open_and_listen


# --- the ring by itself ------------------------------------------------------------------------


@examples(60)
@given(
    st.integers(0, 6),
    st.integers(0, 9),
    st.lists(st.integers(1, 23), min_size=1, max_size=8),
    st.integers(1, 6),
)
def test_every_row_holds_the_position_that_it_says(
    sinks: int, window: int, sizes: list[int], block: int
) -> None:
    """Rows are filled with the number of their position."""
    cache = ContextCache(sinks, window)

    def rows(start: int, stop: int) -> mx.array:
        numbers = mx.arange(start, stop, dtype=mx.float32)
        return mx.broadcast_to(numbers[None, None, :, None], (1, 2, stop - start, 4))

    for size in sizes:
        for start, stop in cache.spans(size):
            first, last = cache.offset + start, cache.offset + stop
            cache.put(first, rows(first, last), rows(first, last))
        cache.advance(size)
        keys, values = cache.with_block(*(rows(cache.offset, cache.offset + block),) * 2)
        length = cache.held + block
        positions = cache.positions(block, cache.rows).tolist()
        assert keys[0, 1, :, 2].tolist() == values[0, 0, :, 0].tolist() == positions[:length]
        assert min(positions[length:], default=2**30) == 2**30
        end = cache.offset
        wanted = {*range(min(sinks, end)), *range(max(end - window, 0), end)}
        assert {*positions[: cache.held]} == wanted
        assert cache.rows <= sinks + window + block


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": -1}, "window must be a whole number >= 0, got -1"),
        ({"window": 2.5}, "window must be a whole number"),
        ({"sinks": True}, "sinks must be a whole number"),
        ({"window": 0, "sinks": 4}, "sinks are 4, and its window keeps the whole context"),
    ],
)
def test_windows_out_of_range(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        DFlashDrafter(write(tmp_path)[0], **options)
