"""Width policies: fixed widths, and the adaptive one against machines with known prices."""

import random
from pathlib import Path

import pytest

import draftloom
from draftloom import SamplingParams
from draftloom.verifiers.width.adaptive import AdaptiveWidth
from draftloom.verifiers.width.auto import AutoWidth
from draftloom.verifiers.width.fixed import FixedWidth


class Machine:
    """Cycles of a made-up machine: plain ones cost `plain`, a width `base` + width * `slope`; a
    draft token is accepted with probability `rate` while those before it were."""

    def __init__(self, plain: float, base: float, slope: float, rate: float, seed: int = 0) -> None:
        self.plain, self.base, self.slope, self.rate = plain, base, slope, rate
        self.random = random.Random(seed)
        self.widths: list[int] = []
        self.tokens = 0
        self.seconds = 0.0

    def run(self, policy: AdaptiveWidth, cycles: int, limit: int = 15) -> None:
        for _ in range(cycles):
            width = policy.choose(limit)
            assert 0 <= width.verify <= width.draft <= limit
            accepted = 0
            while accepted < width.verify and self.random.random() < self.rate:
                accepted += 1
            seconds = self.base + width.verify * self.slope if width.verify else self.plain
            policy.observe(width.draft, width.verify, accepted, seconds)
            self.widths.append(width.verify)
            self.tokens += accepted + 1
            self.seconds += seconds

    def best_rate(self, limit: int = 15) -> float:
        """Tokens a second of the best fixed width, plain decoding among them."""
        rates = [1 / self.plain]
        for width in range(1, limit + 1):
            tokens = sum(self.rate**i for i in range(width + 1))
            rates.append(tokens / (self.base + width * self.slope))
        return max(rates)


@pytest.mark.parametrize(
    ("machine", "widest"),
    [
        pytest.param((0.016, 0.020, 0.0002, 0.85), range(10, 16), id="flat: wide"),
        pytest.param((0.016, 0.020, 0.004, 0.7), range(1, 8), id="sloped: narrow"),
        pytest.param((0.020, 0.025, 0.025, 0.6), range(1), id="linear: parked"),
        pytest.param((0.016, 0.020, 0.0002, 0.02), range(1), id="bad drafter: parked"),
    ],
)
def test_it_finds_what_pays(machine: tuple[float, float, float, float], widest: range) -> None:
    run = Machine(*machine)
    run.run(AdaptiveWidth(), 600)
    late = run.widths[300:]
    usual = max(set(late), key=late.count)
    assert usual in widest
    assert run.tokens / run.seconds > 0.93 * run.best_rate()


@pytest.mark.parametrize(
    ("machine", "share", "least"),
    [
        # Ten tokens would pay if they were accepted, and one in ten is.
        pytest.param((0.020, 0.100, 0.002, 0.1), 0.02, 3, id="it could pay"),
        # However many are accepted, a token costs more than a plain cycle.
        pytest.param((0.020, 0.100, 0.025, 0.6), 0.002, 1, id="it could not"),
    ],
)
def test_a_parked_drafter_is_asked_again_within_its_share(
    machine: tuple[float, float, float, float], share: float, least: int
) -> None:
    run = Machine(*machine)
    run.run(AdaptiveWidth(probe_share=0.02), 4000)
    asked = [width for width in run.widths[10:] if width]
    assert len(asked) >= least
    spent = sum(run.base + width * run.slope - run.plain for width in asked)
    assert spent <= 1.2 * share * run.seconds


def test_it_comes_back_when_the_text_becomes_easy() -> None:
    policy = AdaptiveWidth(probe_share=0.05)
    hard = Machine(0.016, 0.020, 0.0002, 0.02)
    hard.run(policy, 400)
    assert hard.widths[-50:].count(0) >= 35
    easy = Machine(0.016, 0.020, 0.0002, 0.95)
    easy.run(policy, 800)
    assert min(easy.widths[-50:]) >= 4


def test_one_stall_is_not_the_price_of_a_width() -> None:
    run = Machine(0.016, 0.020, 0.0002, 0.85)
    policy = AdaptiveWidth()
    run.run(policy, 100)
    policy.observe(run.widths[-1], run.widths[-1], 3, 5.0)  # the machine slept
    run.run(policy, 20)
    assert min(run.widths[-10:]) >= 8


def test_limits_are_kept() -> None:
    policy = AdaptiveWidth(tokens=4)
    run = Machine(0.016, 0.020, 0.0, 0.99)
    run.run(policy, 60)
    assert max(run.widths) == 4
    assert AdaptiveWidth().choose(0) == (0, 0)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"probe_share": 1.0}, {"memory": 0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptiveWidth(**options)


def test_fixed() -> None:
    assert FixedWidth(6).choose(15) == (6, 6)
    assert FixedWidth(6).choose(4) == (4, 4)
    assert FixedWidth(6, verify=2).choose(15) == (6, 2)
    for bad in ({"tokens": -1}, {"tokens": 2, "verify": 3}):
        with pytest.raises(ValueError, match="must be"):
            FixedWidth(**bad)


def test_auto_repeats_where_a_sampled_text_is_to_repeat() -> None:
    policy = AutoWidth(default=6)
    for params in ({}, {"seed": 1}, {"temperature": 0.7}):
        assert policy.resolve(SamplingParams(**params)) is policy
    fixed = policy.resolve(SamplingParams(temperature=0.7, seed=1))
    assert isinstance(fixed, FixedWidth)
    assert fixed.choose(15) == (6, 6)
    assert policy.park()
    assert policy.choose(15) == fixed.choose(15) == (0, 0)


def test_the_default_width_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builder = draftloom.PipelineBuilder().drafter("prompt-lookup")
    assert builder.check().names["width"] == "auto"
    assert builder.own_width().check().names["width"] == "fixed 8"
    assert builder.width("fixed").check().names["width"] == "fixed 8"
    assert builder.width(3).own_width().check().names["width"] == "fixed 3"
    assert builder.width("adaptive").own_width().check().names["width"] == "adaptive"
    with builder.build() as pipeline:
        drawn = {"temperature": 0.8, "seed": 5, "max_tokens": 12}
        texts = [pipeline.generate("for i in range(10):\n", **drawn).token_ids for _ in range(2)]
    assert texts[0] == texts[1]


def test_an_adaptive_pipeline_writes_the_target_s_own_text() -> None:
    builder = draftloom.PipelineBuilder().drafter("prompt-lookup")
    texts = []
    for width in ("adaptive", 4):
        with builder.width(width).build() as pipeline:
            result = pipeline.generate("def f(x):\n    return x\n\n", max_tokens=16)
            texts.append(result.token_ids)
    assert texts[0] == texts[1]
