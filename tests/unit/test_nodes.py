"""Inserted nodes: what they see, what they change, and when."""

from collections.abc import Callable
from typing import Any

import attrs
import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_logits_processors

from draftloom import ComponentInfo, Draft, PipelineBuilder, Port

from .fakes import (
    PROMPT,
    VOCAB,
    Offer,
    fresh_cache,
    half_right,
    knows,
    model,
    pipeline_of,
    plain,
    same_caches,
)

COUNT = 16
LOGITS = Port("logits", "[B, K+1, V]")
DRAFT = Port("draft", "Draft")


class Node:
    """A node made of a function of its inputs."""

    def __init__(self, call: Callable[..., Any], inputs: Any, outputs: Any = ()) -> None:
        self.info = ComponentInfo("my-lab.node", inputs=tuple(inputs), outputs=tuple(outputs))
        self._call = call

    def __call__(self, *inputs: Any) -> Any:
        return self._call(*inputs)


def run(drafter: Any, node: Node, family: str = "attention", **place: str) -> Any:
    """A generation with a node inserted, and the caches it leaves."""

    def insert(builder: PipelineBuilder) -> PipelineBuilder:
        return builder.insert("my-lab.node", **place)

    offer = Offer(node={"my-lab.node": node})
    with pipeline_of(drafter, offer, target=model(family), configure=insert) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        tokens = tuple(t for chunk in stream for t in chunk.token_ids)
    return tokens, stream


BANNED = 16
"""The first token that the attention model would say."""


def ban(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor as mlx-lm takes it: logits [1, V]."""
    return mx.where(mx.arange(VOCAB) == BANNED, -mx.inf, logits)


@pytest.mark.parametrize("right", [0, 2, 4])
def test_a_logits_processor_changes_the_text_as_in_mlx_lm(right: int) -> None:
    expected = plain(model(), PROMPT, COUNT, logits_processors=[ban])
    assert BANNED in plain(model(), PROMPT, COUNT)
    assert BANNED not in expected
    node = Node(lambda logits: ban(mx.array([]), logits), [LOGITS], [LOGITS])
    tokens, stream = run(half_right(expected, right), node, after="verify")
    assert tokens == expected
    assert same_caches(stream.cache, fresh_cache(model(), (*PROMPT, *expected)[:-1]))
    if right:
        assert stream.stats.accepted > 0


def test_a_bias_of_mlx_lm_as_a_node() -> None:
    (bias,) = make_logits_processors(logit_bias={3: 4.0, 7: -2.0})
    expected = plain(model(), PROMPT, COUNT, logits_processors=[bias])
    assert expected != plain(model(), PROMPT, COUNT)

    def biased(logits: mx.array) -> mx.array:
        return bias(None, logits[0])[None]

    tokens, _ = run(half_right(expected, 3), Node(biased, [LOGITS], [LOGITS]), after="verify")
    assert tokens == expected


def test_two_processors_apply_in_order() -> None:
    first = Node(lambda logits: logits * 0 + mx.arange(VOCAB), [LOGITS], [LOGITS])
    second = Node(lambda logits: -logits, [LOGITS], [LOGITS])
    offer = Offer(node={"one": first, "two": second})

    def generate(*order: str) -> tuple[int, ...]:
        def insert(builder: PipelineBuilder) -> PipelineBuilder:
            for name in order:
                builder = builder.insert(name, before="accept")
            return builder

        with pipeline_of("none", offer, configure=insert) as pipeline:
            return pipeline.generate(PROMPT, max_tokens=3).token_ids

    assert generate("one", "two") == (0, 0, 0)
    assert generate("two", "one") == (VOCAB - 1,) * 3


def test_a_probe_sees_every_cycle_and_the_prompts_own_token() -> None:
    shapes: list[tuple[int, ...]] = []
    expected = plain(model(), PROMPT, COUNT)
    probe = Node(lambda logits: shapes.append(logits.shape), [LOGITS])
    tokens, stream = run(half_right(expected, 2), probe, after="verify")
    assert tokens == expected
    assert len(shapes) == stream.stats.cycles + 1
    assert shapes[0] == (1, 1, VOCAB)
    assert shapes[1:4] == [(1, 5, VOCAB)] * 3


def test_a_probe_after_read_sees_the_outcome_on_the_host() -> None:
    seen: list[Any] = []
    expected = plain(model(), PROMPT, COUNT)
    probe = Node(seen.append, [Port("outcome")])
    tokens, _ = run(half_right(expected, 2), probe, after="read")
    assert tuple(t for outcome in seen for t in outcome.tokens) == tokens
    assert [outcome.num_accepted for outcome in seen[:3]] == [0, 2, 2]


@pytest.mark.parametrize("port", ["anchor", "block"])
def test_a_probe_sees_the_anchor_of_every_cycle(port: str) -> None:
    """The prompt's own token is verified like any other: its anchor is the prompt's last."""
    seen: list[mx.array] = []
    expected = plain(model(), PROMPT, COUNT)
    probe = Node(seen.append, [Port(port)])
    run(half_right(expected, 2), probe, before="verify")
    anchors = [value.reshape(-1)[0].item() for value in seen]
    assert anchors[:3] == [PROMPT[-1], expected[0], expected[3]]


def test_a_filter_of_drafts_runs_before_they_are_verified() -> None:
    """Only drafts: a prompt's own token has none."""
    widths: list[int] = []

    def halve(draft: Draft) -> Draft:
        widths.append(draft.width)
        return draft.first(2)

    expected = plain(model(), PROMPT, COUNT)
    tokens, stream = run(knows(expected), Node(halve, [DRAFT], [DRAFT]), after="draft")
    assert tokens == expected
    assert widths[0] == 4
    assert stream.stats.accepted_by_position == stream.stats.verified_by_position
    assert len(stream.stats.verified_by_position) == 2


def test_a_filter_may_drop_a_draft() -> None:
    expected = plain(model(), PROMPT, COUNT)
    drop = Node(lambda draft: Draft.empty(), [DRAFT], [DRAFT])
    tokens, stream = run(knows(expected), drop, after="draft")
    assert tokens == expected
    assert stream.stats.verified == 0
    assert not stream.stats.fell_back


@pytest.mark.parametrize("family", ["attention", "hybrid"])
def test_a_filter_that_spoils_drafts_costs_no_token(family: str) -> None:
    def spoil(draft: Draft) -> Draft:
        return attrs.evolve(draft, tokens=(draft.tokens + 1) % VOCAB)

    expected = plain(model(family), PROMPT, COUNT)
    node = Node(spoil, [DRAFT], [DRAFT])
    tokens, stream = run(knows(expected), node, family, after="draft")
    assert tokens == expected
    assert stream.stats.accepted == 0


def test_a_node_may_change_what_was_decided() -> None:
    """After `accept`, before the read: here every draft is refused."""
    num_accepted, next_token = Port("num_accepted"), Port("next_token")

    def refuse(logits: mx.array, n: mx.array, following: mx.array) -> Any:
        return mx.zeros_like(n), mx.argmax(logits[:, 0], axis=-1).astype(mx.int32)

    expected = plain(model(), PROMPT, COUNT)
    ports = [num_accepted, next_token]
    tokens, stream = run(knows(expected), Node(refuse, [LOGITS, *ports], ports), after="accept")
    assert tokens == expected
    assert (stream.stats.accepted, stream.stats.cycles) == (0, COUNT - 1)


def test_a_node_after_rollback_finds_the_caches_as_committed() -> None:
    offsets: list[int] = []
    expected = plain(model(), PROMPT, COUNT)
    caches: list[Any] = []
    probe = Node(lambda outcome: offsets.append(caches[0].offset), [Port("outcome")])
    offer = Offer(node={"my-lab.node": probe})

    def insert(builder: PipelineBuilder) -> PipelineBuilder:
        return builder.insert("my-lab.node", after="rollback")

    with pipeline_of(half_right(expected, 2), offer, configure=insert) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        caches.extend(stream.cache)
        list(stream)
    assert offsets[:4] == [7, 10, 13, 16]


def test_nodes_exchange_ports_of_their_own() -> None:
    entropy, seen = Port("entropy", "[B, K+1]"), []
    measure = Node(lambda logits: mx.logsumexp(logits, axis=-1), [LOGITS], [entropy])
    log = Node(lambda values: seen.append(values.shape), [entropy])
    offer = Offer(node={"measure": measure, "log": log})

    def insert(builder: PipelineBuilder) -> PipelineBuilder:
        return builder.insert("measure", after="verify").insert("log", after="rollback")

    expected = plain(model(), PROMPT, COUNT)
    with pipeline_of(half_right(expected, 2), offer, configure=insert) as pipeline:
        assert pipeline.generate(PROMPT, max_tokens=COUNT).token_ids == expected
    assert seen[:2] == [(1, 1), (1, 5)]


def test_options_of_a_node_come_from_insert() -> None:
    class Scale:
        info = ComponentInfo("scale", inputs=(LOGITS,), outputs=(LOGITS,))

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, logits: mx.array) -> mx.array:
            return logits * self.factor

    def insert(builder: PipelineBuilder) -> PipelineBuilder:
        return builder.insert("scale", after="verify", factor=-1.0)

    with pipeline_of("none", Offer(node={"scale": Scale}), configure=insert) as pipeline:
        result = pipeline.generate(PROMPT, max_tokens=4)
    least = plain(model(), PROMPT, 4, logits_processors=[lambda tokens, logits: -logits])
    assert result.token_ids == least
