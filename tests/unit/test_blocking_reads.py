"""The host waits for the device once a cycle.

Every way in which Python code can wait for an array is counted: evaluating, and turning an array
into numbers, text or bytes. A read of an array whose value is there already costs nothing and is
not counted: prompt lookup lists the anchor, which the cycle's own read has computed. An array
counts as there when there is nothing left to compute for it (its graph is a single node) and it
was there, or unknown to the device, when the host last waited. (What numpy reads through the
buffer protocol cannot be counted from here.)
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from draftloom import ComponentInfo, ModelInfo, Port
from tests.support.checkpoints import Golden, write

from .fakes import (
    PROMPT,
    VOCAB,
    Offer,
    half_right,
    model,
    pipeline_of,
    plain,
    write_dflash,
)

COUNT = 24
READS = (
    "tolist", "item", "__int__", "__float__", "__bool__", "__complex__", "__index__", "__array__",
    "__bytes__", "__str__", "__repr__", "__format__", "__dlpack__", "__reduce__", "__getstate__",
)  # fmt: skip


class Waits:
    """Counts what blocks, by name."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._launched: list[mx.array] = []
        self._inside = False

    def launched(self, values: Any) -> None:
        """Arrays were given to the device; they may not be there for a while."""
        if isinstance(values, mx.array):
            self._launched.append(values)
        elif isinstance(values, dict):
            self.launched(list(values.values()))
        elif isinstance(values, list | tuple):
            for value in values:
                self.launched(value)

    def read(self, name: str, array: Any, call: Callable[[], Any]) -> Any:
        """The host reads an array."""
        if self._inside:
            return call()
        if not self._there(array):
            self.names.append(name)
            self._launched.clear()  # the device works in order: all that came before is done
        self._inside = True
        try:
            return call()
        finally:
            self._inside = False

    def _there(self, array: Any) -> bool:
        if not isinstance(array, mx.array) or any(array is other for other in self._launched):
            return False
        graph = io.StringIO()
        mx.export_to_dot(graph, array)
        return "->" not in graph.getvalue()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Count every wait from here on."""
    counter = Waits()

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            subject = args[0] if owner is mx.array else None
            return counter.read(name, subject, lambda: original(*args, **kwargs))

        monkeypatch.setattr(owner, name, counted)

    launch = mx.async_eval

    def launched(*values: Any) -> None:
        launch(*values)
        counter.launched(values)

    for name in READS:
        if name in vars(mx.array):
            wrap(mx.array, name)
    for name in ("eval", "synchronize", "save", "savez", "save_safetensors"):
        wrap(mx, name)
    monkeypatch.setattr(mx, "async_eval", launched)
    return counter


def test_the_counter_counts(waits: Waits) -> None:
    a = mx.array([1.0, 2.0]) + 1
    mx.async_eval(a)
    assert waits.names == []
    assert a.tolist() == [2.0, 3.0]
    assert waits.names == ["tolist"]
    assert a.tolist() == [2.0, 3.0], "it is there now"
    assert waits.names == ["tolist"]
    assert float((a * 2)[0]) == 4.0
    assert bool(mx.all(a > 1))
    assert str(a + 1).startswith("array")
    mx.eval(a + 2)
    assert len(waits.names) == 5


def waits_by_cycle(waits: Waits, pipeline: Any, **options: Any) -> tuple[list[list[str]], Any]:
    """What the host waited for in each cycle, that of the prompt's own token left out."""
    found: list[list[str]] = []
    stream = pipeline.stream(PROMPT, max_tokens=COUNT, **options)
    for _ in stream:
        found.append(list(waits.names))
        waits.names.clear()
    assert stream.stats.generated_tokens == COUNT
    return found[1:], stream


DRAFTERS: dict[str, Callable[[Any, str], Any]] = {
    "none": lambda builder, dflash: builder.drafter("none"),
    "prompt-lookup": lambda builder, dflash: builder.drafter("prompt-lookup"),
    "dflash": lambda builder, dflash: builder.drafter("dflash", checkpoint=dflash),
    "dflash2": lambda builder, dflash: builder.drafter(
        "dflash2", checkpoint=convolved(Path(dflash).parent), window=6, sinks=2
    ),
    "dspark": lambda builder, dflash: builder.drafter(
        "dspark", checkpoint=spark(Path(dflash).parent), confidence_threshold=0.1
    ),
    "autoregressive": lambda builder, dflash: builder.drafter(
        "autoregressive", model=draft_model(builder)
    ),
    "cascade": lambda builder, dflash: builder.drafter(
        "cascade", stages=["prompt-lookup", {"use": "dflash", "checkpoint": dflash}]
    ),
}


def spark(folder: Path) -> str:
    """A DSpark checkpoint with a reduced vocabulary and a confidence head."""
    golden = Golden(
        hidden=32, vocab=VOCAB, taps=(0, 1), draft_ids=tuple(range(1, VOCAB, 2)), first_slot=0,
        markov="vanilla", confidence=True,
    )  # fmt: skip
    return str(write(folder / "spark", "speculators", golden))


def convolved(folder: Path) -> str:
    """A DFlash 2 checkpoint."""
    golden = Golden(hidden=32, vocab=VOCAB, taps=(0, 1), convolution=(3, 8))
    return str(write(folder / "convolved", "z-lab-new", golden))


def draft_model(builder: Any) -> Any:
    """Another model behind an adapter."""
    small = model("attention", 1)
    info = ModelInfo.from_model(small)
    factory = builder.plugins.adapter_for(info).load()
    return factory(small, factory.describe(info))


@pytest.mark.parametrize("family", ["attention", "hybrid"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_one_wait_a_cycle(name: str, family: str, waits: Waits, tmp_path: Path) -> None:
    dflash = str(write_dflash(tmp_path / "drafter"))
    with pipeline_of(
        target=model(family), configure=lambda b: DRAFTERS[name](b, dflash)
    ) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline)
    assert not stream.stats.fell_back
    assert cycles == [["tolist"]] * stream.stats.cycles
    if name != "none":
        assert stream.stats.verified > 0


@pytest.mark.parametrize("family", ["attention", "hybrid"])
@pytest.mark.parametrize("rollback", ["auto", "snapshot"])
@pytest.mark.parametrize("right", [0, 2, 4])
def test_one_wait_a_cycle_whatever_is_rolled_back(
    family: str, rollback: str, right: int, waits: Waits
) -> None:
    drafter = half_right(plain(model(family), PROMPT, COUNT), right)
    with pipeline_of(
        drafter, target=model(family), configure=lambda b: b.rollback(rollback)
    ) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline)
    assert cycles == [["tolist"]] * stream.stats.cycles


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 2}],
    ids=["plain", "filters"],
)
def test_one_wait_a_cycle_when_sampling(options: dict[str, Any], waits: Waits) -> None:
    with pipeline_of(
        configure=lambda b: b.drafter("autoregressive", model=draft_model(b))
    ) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline, **options)
    assert stream.stats.verified > 0
    assert cycles == [["tolist"]] * stream.stats.cycles


PENALTIES = {
    "repetition_penalty": 1.2,
    "repetition_context_size": 0,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
    "logit_bias": {3: 1.5, 4: -2.0},
}


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (PENALTIES, "tolist"),
        (
            {"temperature": 0.9, "xtc_probability": 0.5, "xtc_special_tokens": [1], "seed": 1},
            "tolist",
        ),
        ({**PENALTIES, "logprobs": True, "top_logprobs": 3}, "eval"),
    ],
    ids=["penalties", "xtc", "logprobs"],
)
def test_one_wait_a_cycle_with_every_built_in_parameter(
    options: dict[str, Any], read: str, waits: Waits
) -> None:
    drafter = half_right(plain(model(), PROMPT, COUNT), 2)
    with pipeline_of(drafter) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline, **options)
    assert stream.stats.verified > 0
    assert cycles == [[read]] * stream.stats.cycles


def test_processors_of_the_users_own_wait_for_the_draft_besides(waits: Waits) -> None:
    """Not once a position, and not for the target."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        history: Any = tokens.tolist()
        return logits - 0.5 * (mx.arange(logits.shape[-1]) == history[-1])

    with pipeline_of(
        configure=lambda b: b.drafter("autoregressive", model=draft_model(b))
    ) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline, logits_processors=[processor])
    assert stream.stats.verified > 0
    assert all(cycle.count("eval") <= 1 for cycle in cycles)
    assert all(cycle[-1] == "tolist" for cycle in cycles)


def test_one_wait_a_cycle_when_a_walk_is_drawn(waits: Waits, tmp_path: Path) -> None:
    folder = convolved(tmp_path)
    with pipeline_of(configure=lambda b: b.drafter("dflash2", checkpoint=folder)) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline, temperature=1.0, seed=1)
    assert stream.stats.verified > 0
    assert cycles == [["tolist"]] * stream.stats.cycles


def test_a_node_that_reads_costs_a_second_wait(waits: Waits) -> None:
    class Reads:
        info = ComponentInfo("reads", inputs=(Port("logits"),))

        def __call__(self, logits: mx.array) -> None:
            assert logits.max().item() < 1e6

    with pipeline_of(
        "none",
        Offer(node={"reads": Reads()}),
        configure=lambda b: b.insert("reads", after="verify"),
    ) as pipeline:
        cycles, stream = waits_by_cycle(waits, pipeline)
    assert cycles == [["item", "tolist"]] * stream.stats.cycles


def in_order(waits: Waits) -> list[str]:
    """Launches and reads from now on, in order."""
    order: list[str] = []
    launched, read = waits.launched, waits.read
    waits.launched = lambda values: (order.append("launch"), launched(values))[1]  # type: ignore
    waits.read = lambda name, array, call: (  # type: ignore[method-assign]
        order.append(name),
        read(name, array, call),
    )[1]
    return order


def test_nothing_is_read_before_the_next_draft_is_launched(waits: Waits) -> None:
    """Between the read of a cycle and the launch of the next draft the host does not wait."""
    order = in_order(waits)
    drafter = half_right(plain(model(), PROMPT, COUNT), 2)
    with pipeline_of(drafter) as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        next(stream)
        order.clear()
        for _ in range(3):
            next(stream)
            # The read is launched and waited for; then the scripted drafter lists the anchor,
            # which is there already.
            waiting = [name for name in order if name != "launch"]
            assert waiting == ["tolist", "tolist"]
            assert order[-1] == "launch", "before the chunk is handed out"
            order.clear()


def test_a_plain_cycle_is_launched_before_the_last_one_is_read(waits: Waits) -> None:
    order = in_order(waits)
    with pipeline_of() as pipeline:
        stream = pipeline.stream(PROMPT, max_tokens=COUNT)
        next(stream)
        for _ in range(3):
            order.clear()
            next(stream)
            assert order.count("tolist") == 1
            assert order[-1] == "tolist", "nothing is left to launch after the wait"
