"""The steps of a cycle at the shape of a public model, with each kernel off and on.

    python docs/benchmarks/step_of_a_shape.py OUT.json [--shape qwen3.5-4b]
    python docs/benchmarks/step_of_a_shape.py OUT.json --kernel gated-norm=cuda --kernel ...
    python docs/benchmarks/step_of_a_shape.py OUT.json --setting "defaults" \\
        --setting "traced: compiled-pass=on compiled-draft=on" --turns 5

Weights are random, of one model for all settings; its drafter's are made anew for each. A setting
is all kernels off, all on, or one of them on alone; ``--kernel`` (repeatable) names those to try.
"off" leaves the recurrence of gated-delta layers as `auto` runs it. ``--setting`` (repeatable)
names others instead: several kernels at once, everything else as `auto` has it. Settings and
mlx-lm take turns, `--turns` times, so that a machine which changes its speed changes it for all.
Milliseconds, medians with the least and the most, after a warm-up in each turn:

- verify, M tokens: open a speculation, one pass of the target with the drafter's taps, one blocking
  read of the best tokens and the features; then all is taken back, untimed.
- commit: of 8 of 16 tokens, the call alone; "state" is waiting for the caches after it.
- draft: committed features in, a block of draft tokens out, waited for.
- cycle: verify of the block, read, commit and the launch of the next draft in a row, as the engine
  does them, with one wait. Its tokens mean nothing: 8 are kept whatever they are.
- mlx-lm: its own model and caches, a token at a time, waited for; "ahead" launches the next step
  before it waits, as `mlx_lm` does.

"agrees" is the share of best tokens after a block of 16 that are those of the first setting. What
cannot run here is recorded as not available, what fails with its error; the JSON is written after
each measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from draftloom import GraphError, PipelineBuilder
from draftloom.apps.bench.report import machine
from draftloom.apps.bench.simulate import DTYPES, shape_names, simulated_subject
from draftloom.apps.bench.subjects import Simulation
from draftloom.contracts import DraftRequest
from draftloom.drafting import propose_first
from draftloom.sampling import SamplingParams, SamplingState
from draftloom.versions import version_of

KERNELS = (
    "verify-attention=cuda",
    "replay-verify=on",
    "gated-delta-inputs=cuda",
    "gated-norm=cuda",
    "packed-projections=packed",
    "packed-drafter=packed",
    "early-launch=eighths",
    "early-launch=every-layer",
    "compiled-pass=on",
    "compiled-draft=on",
    "few-rows=cuda",
)
SIZES, BLOCK, KEPT, WARM_UP = (1, 2, 4, 8, 16), 16, 8, 4
Times = dict[str, float]
Samples = dict[str, list[float]]
"""Seconds by what was timed."""


def settings_of(kernels: list[str]) -> dict[str, dict[str, str]]:
    """Choices by operation, by name of the setting; of two of one operation, "all on" has the
    first. Compiled passes cannot have early launches, so that "all on" has none beside them."""
    pairs = [tuple(text.split("=", 1)) for text in kernels]
    off = {operation: "off" for operation, _ in pairs if operation != "gated-delta"}
    first = dict(reversed(pairs))
    if "compiled-pass" in first:
        first.pop("early-launch", None)
    singles = {f"{name}={choice}": off | {name: choice} for name, choice in pairs}
    return {"off": off, "all on": off | first, **singles}


def named(text: str) -> tuple[str, dict[str, str]]:
    """The name and the choices of ``name: op=choice op=choice``; without choices all is `auto`."""
    name, _, choices = text.partition(":")
    return name.strip(), dict(choice.split("=", 1) for choice in choices.split())


def timed(run: Callable[[], tuple[float, ...]], rounds: int) -> list[list[float]]:
    """Seconds of each number that a run gives, round by round."""
    for _ in range(WARM_UP):
        run()
    return [list(column) for column in zip(*[run() for _ in range(rounds)], strict=True)]


def in_short(column: list[float]) -> Times:
    """The middle, the least and the most, in milliseconds."""
    return {
        "ms": 1e3 * statistics.median(column),
        "ms_min": 1e3 * min(column),
        "ms_max": 1e3 * max(column),
    }


def states(cache: list[Any]) -> list[mx.array]:
    """Every array of the caches."""
    return [array for _, array in tree_flatten([entry.state for entry in cache])]


class Steps:
    """The parts of a built pipeline over a context.

    Args:
        pipeline: built.
        prompt: [1, N] tokens.
    """

    def __init__(self, pipeline: Any, prompt: mx.array) -> None:
        self.parts = pipeline._parts
        self.target, self.drafter = self.parts.target, self.parts.drafter
        self.vocabulary = self.target.info.vocab_size
        self.sampling = SamplingState(SamplingParams())
        self.width = min(BLOCK - 1, self.drafter.info.max_width or BLOCK - 1)
        self.prompt = prompt
        self.block = mx.random.randint(0, self.vocabulary, (1, BLOCK), key=mx.random.key(2))

    def begin(self) -> tuple[list[Any], Any, mx.array | None]:
        """Caches and a draft session that hold the prompt, and its features."""
        cache = self.target.make_cache()
        features = self.target.forward(self.prompt, cache).features
        ids = tuple(self.prompt[0].tolist())
        session = self.drafter.open(DraftRequest((ids,), self.sampling, self.vocabulary))
        session.observe((ids,), features)
        mx.eval(states(cache), [] if features is None else features)
        return cache, session, features

    def look(self, cache: list[Any], block: mx.array) -> tuple[Any, mx.array, mx.array | None]:
        """The speculation, the best tokens and the features of a block; lazy."""
        speculation = self.parts.open_speculation(cache, block)
        output = self.parts.verifier.verify(self.target, block, speculation)
        return speculation, output.logits.argmax(axis=-1).astype(mx.int32), output.features

    def verify(self, cache: list[Any], tokens: int) -> tuple[float]:
        """Seconds of a pass over so many tokens."""
        start = time.perf_counter()
        speculation, best, features = self.look(cache, self.block[:, :tokens])
        mx.eval(best, [] if features is None else features)
        end = time.perf_counter()
        speculation.abort()
        return (end - start,)

    def commit(self, cache: list[Any]) -> tuple[float, float]:
        """Seconds inside commit, and until the caches are there."""
        speculation, best, features = self.look(cache, self.block)
        mx.eval(best, [] if features is None else features)
        start = time.perf_counter()
        speculation.commit((KEPT - 1,))
        called = time.perf_counter()
        mx.eval(states(cache))
        return called - start, time.perf_counter() - called

    def draft(self, session: Any, features: mx.array) -> tuple[float]:
        """Seconds of a draft."""
        start = time.perf_counter()
        session.observe(((0,) * KEPT,), features[:, :KEPT])
        anchor = mx.array([5], dtype=mx.int32)
        draft = propose_first(session, anchor, self.width, self.width, self.sampling)
        mx.eval(draft.tokens)
        return (time.perf_counter() - start,)

    def cycle(self, cache: list[Any], held: dict[str, Any]) -> tuple[float]:
        """Seconds of a whole cycle: from a launched draft to the launch of the next one."""
        start = time.perf_counter()
        anchor = held["anchor"]
        block = mx.concatenate([anchor[:, None], held["draft"]], axis=1)
        speculation, best, features = self.look(cache, block)
        mx.eval(best)
        kept = min(KEPT, block.shape[1])
        speculation.commit((kept - 1,))
        held["anchor"] = best[:, kept - 1]
        if features is not None:
            held["session"].observe(((0,) * kept,), features[:, :kept])
        self.propose(held)
        return (time.perf_counter() - start,)

    def propose(self, held: dict[str, Any]) -> None:
        """Launch the next draft."""
        drafted = propose_first(
            held["session"], held["anchor"], self.width, self.width, self.sampling
        )
        held["draft"] = drafted.tokens.astype(mx.int32)
        mx.async_eval(held["draft"])

    def measure(self, rounds: int, sizes: list[int]) -> tuple[Samples, list[int]]:
        """All of it, and the best tokens after a block."""
        cache, session, features = self.begin()
        found: Samples = {}
        for tokens in sizes:
            (found[f"M={tokens}"],) = timed(lambda n=tokens: self.verify(cache, n), rounds)
        speculation, best, _ = self.look(cache, self.block)
        seen: list[int] = best[0].tolist()
        speculation.abort()
        found["commit"], found["state"] = timed(lambda: self.commit(cache), rounds)
        if features is not None:
            (found["draft"],) = timed(lambda: self.draft(session, features), rounds)
        cache, session, _ = self.begin()
        held = {"session": session, "anchor": mx.array([5], dtype=mx.int32)}
        self.propose(held)
        (found["cycle"],) = timed(lambda: self.cycle(cache, held), rounds)
        return found, seen


def stock(model: Any, prompt: mx.array, rounds: int) -> Samples:
    """mlx-lm's own step."""
    cache = make_prompt_cache(model)
    now = model(prompt, cache=cache)[:, -1].argmax(axis=-1)
    mx.eval(now, states(cache))

    def step() -> tuple[float]:
        nonlocal now
        start = time.perf_counter()
        now = model(now[:, None], cache=cache)[:, -1].argmax(axis=-1)
        mx.eval(now)
        return (time.perf_counter() - start,)

    def ahead() -> tuple[float]:
        nonlocal now
        start = time.perf_counter()
        following = model(now[:, None], cache=cache)[:, -1].argmax(axis=-1)
        mx.async_eval(following)
        mx.eval(now)
        now = following
        return (time.perf_counter() - start,)

    return {"step": timed(step, rounds)[0], "ahead": timed(ahead, rounds)[0]}


class Setting:
    """What was found of one setting, turn after turn.

    Args:
        builder: of its pipeline.
    """

    def __init__(self, builder: PipelineBuilder) -> None:
        self._builder = builder
        self._samples: Samples = {}
        self._seconds: list[float] = []
        self.found: dict[str, Any] = {}
        try:
            builder.check()
        except GraphError as error:
            self.found = {"not available": " ".join(str(error).split())}

    def turn(
        self, prompt: mx.array, rounds: int, sizes: list[int], expected: list[int]
    ) -> dict[str, Any]:
        """Measure once more, and what is known so far; `expected` is filled by the first setting
        that gives tokens."""
        if "not available" in self.found or "failed" in self.found:
            return self.found
        start = time.perf_counter()
        try:
            with self._builder.build() as pipeline:
                steps = Steps(pipeline, prompt)
                samples, seen = steps.measure(rounds, sizes)
                folder = tempfile.gettempdir()
                text = re.sub(re.escape(folder) + r"\S+", "a temporary folder", pipeline.describe())
                self.found["pipeline"] = text
                self.found["draft_tokens"] = steps.width
        except Exception as error:  # noqa: BLE001 - the next setting is still worth having
            said = " ".join(str(error).split())[:500]
            self.found = {"failed": f"{type(error).__name__}: {said}"}
            return self.found
        expected[:] = expected or seen
        agrees = sum(a == b for a, b in zip(seen, expected, strict=True)) / len(seen)
        self._seconds.append(time.perf_counter() - start)
        add(self._samples, samples)
        self.found |= {"agrees": agrees, "seconds": self._seconds}
        self.found |= {name: in_short(column) for name, column in self._samples.items()}
        return self.found


def add(to: Samples, more: Samples) -> None:
    """Add the samples of one more turn."""
    for name, column in more.items():
        to.setdefault(name, []).extend(column)


def line(name: str, found: dict[str, Any]) -> str:
    """A setting in a line."""
    why = found.get("not available") or found.get("failed")
    if why:
        return f"{name}: {why}"
    times = ", ".join(f"{k} {v['ms']:.2f}" for k, v in found.items() if isinstance(v, dict))
    return f"{name}: {times} ms" + (f"; agrees {found['agrees']:.2f}" if "agrees" in found else "")


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="qwen3.5-4b", choices=shape_names())
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--kernel", action="append", metavar="OP=CHOICE", help="instead of all")
    parser.add_argument(
        "--setting", action="append", metavar="'NAME: OP=CHOICE ...'", help="instead of those"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="tokens of a pass")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10, help="a turn")
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    settings = settings_of(options.kernel or list(KERNELS))
    if options.setting:
        settings = dict(map(named, options.setting))
    start = time.perf_counter()
    subject = simulated_subject(Simulation(options.shape, (1.0,)), options.dtype, [("own", None)])
    made = time.perf_counter() - start
    print(f"weights made in {made:.1f} s", flush=True)
    builder = subject.variants[-1].builder
    assert builder is not None
    key = mx.random.key(1)
    prompt = mx.random.randint(0, subject.vocab_size, (1, options.context), key=key)
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "shape": options.shape,
        "dtype": options.dtype,
        "context": options.context,
        "rounds": options.rounds * options.turns,
        "kept": KEPT,
        "weights_seconds": made,
        "chosen": settings,
        "settings": {},
    }

    def write() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    expected: list[int] = []
    plain: Samples = {}
    tried = {name: Setting(builder.kernels(choices)) for name, choices in settings.items()}
    for turn in range(options.turns):
        for name, setting in tried.items():
            found = setting.turn(prompt, options.rounds, options.sizes, expected)
            report["settings"][name] = found
            print(f"{turn + 1}: {line(name, found)}", flush=True)
            write()
            mx.clear_cache()
        add(plain, stock(subject.model, prompt, options.rounds))
        report["mlx-lm"] = {name: in_short(column) for name, column in plain.items()}
        print(f"{turn + 1}: {line('mlx-lm', report['mlx-lm'])}", flush=True)
        write()


if __name__ == "__main__":
    main()
