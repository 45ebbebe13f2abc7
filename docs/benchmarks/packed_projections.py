"""What one product for several projections is worth: a target's step and a drafter's, each packing.

    python docs/benchmarks/packed_projections.py OUT.json                     # qwen3.5-4b's shape
    python docs/benchmarks/packed_projections.py OUT.json --bits 4            # quantized
    python docs/benchmarks/packed_projections.py OUT.json --pair python-17m   # a bundled pair

A step is begin, forward and abort of a block of M tokens over a context; of the drafter, seven
committed tokens taken in and a block of slots filled. Several steps depend on one another and are
waited for once; a time is theirs over their number. All ways are timed in every round, in random
order, and ratios are those of one round: its time over the time of ``off``. Weights of a shape are
random; what is switched between the ways is which products run, on the same memory. On a CPU the
time is the process's own, so that what else a machine does counts less.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom import KernelSettings, PipelineBuilder
from draftloom.abilities import BindContext
from draftloom.apps.bench.simulate import SimulatedDFlash, _model, _shapes, drafter_config
from draftloom.contracts import DraftRequest
from draftloom.kernels.packed_projections import PLANS
from draftloom.kernels.packed_projections.plan import WORTH
from draftloom.sampling import SamplingParams, SamplingState
from draftloom.versions import version_of

TARGET, DRAFTER = "packed-projections", "packed-drafter"
KINDS = {
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), "gated-delta"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj"), "mlp"),
}
COMMITTED, WARM_UP = 7, 2
Way = Callable[[int], float]
"""(steps) -> seconds a step."""


def clock() -> float:
    """Seconds: of the wall where a GPU works, of the process's threads where a CPU does."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return time.process_time() if on_cpu else time.perf_counter()


def ways_of(operation: str) -> list[str]:
    """``off`` and every packing by name."""
    return ["off", *(name for name in PLANS[operation] if name != "measure")]


class Target:
    """A target whose packings are switched without moving a weight."""

    def __init__(self, pipeline: Any, context: int) -> None:
        self._parts = pipeline._parts
        self._adapter = self._parts.target
        places = self._adapter.packed._replaced
        self._switches = [(owner, name, owner[name], linear) for owner, name, linear in places]
        self._cache = self._adapter.make_cache()
        vocabulary = self._adapter.info.vocab_size
        key = mx.random.key(1)
        tokens = mx.random.randint(0, vocabulary, (1, context), key=key)
        self._adapter.forward(tokens, self._cache)
        mx.eval([entry.state for entry in self._cache])
        self._block = mx.random.randint(0, vocabulary, (1, 64), key=mx.random.key(2))

    def choose(self, way: str) -> None:
        """Run these kinds of places as one product, the others apart."""
        for owner, name, part, linear in self._switches:
            on = way in ("packed", KINDS[name])
            owner[name] = part if on else linear

    def way(self, name: str, tokens: int) -> Way:
        """Times a step of so many tokens."""

        def run(steps: int) -> float:
            self.choose(name)
            block = self._block[:, :tokens]
            start = clock()
            for _ in range(steps):
                speculation = self._parts.open_speculation(self._cache, block)
                logits = self._adapter.forward(block, speculation.cache).logits
                speculation.abort()
                block = self._block[:, :tokens] + 0 * logits.argmax(axis=-1)[:, -1:]
            mx.eval(block)
            return (clock() - start) / steps

        return run


def drafter_way(drafter: Any, target: Any, context: int) -> Way:
    """Times a drafter's step: committed features in, a block of drafts out."""
    state = SamplingState(SamplingParams())
    vocabulary, width = target.info.vocab_size, drafter.info.max_width
    size = len(drafter.info.tap_layers) * target.info.hidden_size
    dtype = target.embed(mx.array([[0]])).dtype
    features = mx.random.normal((1, COMMITTED, size), key=mx.random.key(3)).astype(dtype)
    session = drafter.open(DraftRequest(((0,),), state, vocabulary))
    for start in range(0, context, 64):
        count = min(64, context - start)
        rows = mx.random.normal((1, count, size), key=mx.random.key(start)).astype(dtype)
        session.observe(([0] * count,), rows)

    def run(steps: int) -> float:
        anchor = mx.array([5], dtype=mx.int32)
        start = clock()
        for _ in range(steps):
            session.observe(([0] * COMMITTED,), features)
            anchor = session.propose(anchor, width, state).tokens[:, -1]
        mx.eval(anchor)
        return (clock() - start) / steps

    return run


def shape_drafters(shape: str, target: Any) -> dict[str, Any]:
    """A random drafter for each packing."""
    found: dict[str, Any] = {}
    config = drafter_config(_shapes()[shape]["target"], _shapes()[shape]["drafter"])
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        for way in ways_of(DRAFTER):
            drafter = SimulatedDFlash(Path(folder))
            unused: Any = None
            settings = KernelSettings.of({DRAFTER: way})
            drafter.bind(BindContext(target, "auto", unused, unused, settings))
            found[way] = drafter
    return found


def compare(ways: dict[str, Way], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step of each way, and its ratio to ``off`` of the same round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    for number in range(rounds + WARM_UP):
        shuffle(order)
        for name in order:
            seconds = ways[name](steps)
            if number >= WARM_UP:
                times[name].append(seconds)
    report = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["off"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        report[name] = {
            "ms": 1e3 * statistics.median(values),
            "least_ms": 1e3 * min(values),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }
        print(f"  {name:12} {report[name]['ms']:8.3f} ms  {middle:.3f} ({low:.3f} to {high:.3f})")
    return report


def pays(reports: list[dict[str, dict[str, float]]]) -> list[str]:
    """The kinds that were clearly faster in three quarters of the rounds, at every width: what
    belongs in the table of `draftloom.kernels.packed_projections.PAYS` for this backend."""
    kinds = [name for name in reports[0] if name not in ("off", "packed")]
    return [kind for kind in kinds if all(report[kind]["ratio_high"] < WORTH for report in reports)]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="qwen3.5-4b")
    parser.add_argument("--pair", help="a bundled pair instead of random weights")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the random target")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    if options.pair:
        builder = PipelineBuilder(options.pair)
    else:
        model = _model(_shapes()[options.shape]["target"], 0, mx.bfloat16)
        if options.bits:
            nn.quantize(model, group_size=64, bits=options.bits)
            mx.eval(model.parameters())
        builder = PipelineBuilder().model(model).drafter("none")
    pipeline = builder.kernels({TARGET: "packed"}).build()
    target = pipeline._parts.target
    if options.pair:
        built = {w: builder.kernels({DRAFTER: w}).build() for w in ways_of(DRAFTER)}
        drafters = {way: other._parts.drafter for way, other in built.items()}
    else:
        drafters = shape_drafters(options.shape, target)
    gpu = mx.default_device() == mx.Device(mx.gpu)
    report: dict[str, Any] = {
        "device": mx.device_info(mx.gpu).get("device_name") if gpu else platform.machine() + " CPU",
        "what": options.pair or f"{options.shape}, random weights",
        "bits": options.bits,
        "type": str(target.embed(mx.array([[0]])).dtype),
        "mlx": mx.__version__,
        "mlx_lm": version_of("mlx-lm"),
        "python": platform.python_version(),
        "settings": {k: getattr(options, k) for k in ("context", "rounds", "steps")},
        "target": {},
    }
    switched = Target(pipeline, options.context)
    for tokens in options.tokens:
        print(f"target, {tokens} tokens")
        ways = {name: switched.way(name, tokens) for name in ways_of(TARGET)}
        report["target"][str(tokens)] = compare(ways, options.rounds, options.steps)
    print("drafter")
    ways = {n: drafter_way(d, target, options.context) for n, d in drafters.items()}
    report["drafter"] = compare(ways, options.rounds, options.steps)
    report["pays"] = {
        TARGET: pays(list(report["target"].values())),
        DRAFTER: pays([report["drafter"]]),
    }
    print("pays:", report["pays"])
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
