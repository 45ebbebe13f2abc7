"""Where the time of a pass goes on the host, with compiled passes and drafts off and on.

    python docs/benchmarks/compiled_pass.py OUT.json
    python docs/benchmarks/compiled_pass.py OUT.json --shape qwen3.5-4b [--kernel OP=CHOICE ...]

Without ``--shape``: a tiny random hybrid of many layers, float32, whose arithmetic is next to
nothing, so that it runs on a CPU. Of a pass of M tokens over a context, in milliseconds, medians
with the least and the most; off and on take turns:

- build: opening the speculation and calling the target, until Python has the lazy outputs.
- launch: handing logits and features to the device (`mx.async_eval`).
- wait: until they are there.
- build CPU, launch CPU: the same by the clock of this thread's own work, which a busy machine does
  not lengthen.

Then the speculation is taken back, untimed. "calls" is how many functions of Python and of MLX
building a pass calls, "nodes" how many operations its graph has, counted in passes of their own.
"draft" is the same of a block of draft tokens, where the shape has a drafter; the features of 8
tokens come in before, and their projection is part of it.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5

from draftloom import PipelineBuilder
from draftloom.apps.bench.report import machine
from draftloom.apps.bench.simulate import (
    DTYPES,
    randomize,
    shape_names,
    simulated_subject,
)
from draftloom.apps.bench.subjects import Simulation
from draftloom.contracts import DraftRequest
from draftloom.sampling import SamplingParams, SamplingState
from draftloom.versions import version_of

SIZES, WARM_UP, KEPT, TURNS = (1, 4, 16), 4, 8, 5
PARTS = ("build", "launch", "wait", "build CPU", "launch CPU")
TINY = {
    "model_type": "qwen3_5",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


def subject(options: argparse.Namespace) -> tuple[PipelineBuilder, int, Any]:
    """What is measured, the size of its vocabulary, and what is to be kept until the end."""
    if options.shape is not None:
        simulation = Simulation(options.shape, (1.0,))
        found = simulated_subject(simulation, options.dtype, [("own", None)])
        builder = found.variants[-1].builder
        assert builder is not None
        return builder, found.vocab_size, found
    config = TINY | {"num_hidden_layers": options.layers}
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    randomize(model, 0, mx.float32)
    return PipelineBuilder().model(model, None).drafter("none"), config["vocab_size"], None


Lazy = tuple[Callable[[], None], list[mx.array]]
"""What takes a run back, and the arrays it gives."""


class Passes:
    """Passes of a built pipeline over a context.

    Args:
        pipeline: built.
        prompt: [1, N] tokens.
    """

    def __init__(self, pipeline: Any, prompt: mx.array) -> None:
        self.parts = pipeline._parts
        self.target = self.parts.target
        self.cache = self.target.make_cache()
        self.features = self.target.forward(prompt, self.cache).features
        mx.eval([array for _, array in tree_flatten([e.state for e in self.cache])])
        self.session: Any = None
        if self.features is not None:
            ids, sampling = tuple(prompt[0].tolist()), SamplingState(SamplingParams())
            request = DraftRequest((ids,), sampling, self.target.info.vocab_size)
            self.session = self.parts.drafter.open(request)
            self.session.observe((ids,), self.features)
            self.anchor, self.sampling = mx.array([5]), sampling
            self.draft()

    def look(self, block: mx.array) -> Lazy:
        """How to take a pass over a block back, and its logits and features, lazy."""
        speculation = self.parts.open_speculation(self.cache, block)
        output = self.parts.verifier.verify(self.target, block, speculation)
        outputs = [a for a in (output.logits, output.features) if a is not None]
        return speculation.abort, outputs

    def draft(self) -> Lazy:
        """The tokens of a draft, lazy."""
        self.session.observe(((0,) * KEPT,), self.features[:, :KEPT])
        width = self.parts.drafter.info.max_width
        draft = self.session.propose(self.anchor, width, self.sampling)
        return _nothing, [draft.tokens]

    @staticmethod
    def one(run: Callable[[], Lazy]) -> tuple[float, ...]:
        """Seconds of each of `PARTS`."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        take_back, outputs = run()
        built, cpu_built = time.perf_counter(), time.thread_time()
        mx.async_eval(outputs)
        launched, cpu_launched = time.perf_counter(), time.thread_time()
        mx.eval(outputs)
        end = time.perf_counter()
        take_back()
        cpu = cpu_built - cpu_start, cpu_launched - cpu_built
        return built - start, launched - built, end - launched, *cpu

    @staticmethod
    def calls(run: Callable[[], Lazy]) -> int:
        """Functions that a run calls before its arrays are computed."""
        count = 0

        def counted(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            take_back, outputs = run()
        finally:
            sys.setprofile(None)
        mx.eval(outputs)
        take_back()
        return count


def nodes(outputs: list[mx.array]) -> int:
    """Operations in the graph of lazy arrays: the rectangles of its drawing."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *outputs)
    return drawing.getvalue().count("rectangle")


def _nothing() -> None:
    """There is nothing to take back."""


def measure(pipeline: Any, prompt: mx.array, vocab: int, rounds: int) -> dict[str, Any]:
    """(seconds of `PARTS` by round, calls, nodes) by M, and of a draft."""
    passes = Passes(pipeline, prompt)
    runs: dict[str, Callable[[], Lazy]] = {}
    for tokens in SIZES:
        block = mx.random.randint(0, vocab, (1, tokens), key=mx.random.key(2))
        mx.eval(block)
        runs[f"M={tokens}"] = partial(passes.look, block)
    if passes.session is not None:
        runs["draft"] = passes.draft
    found = {}
    for name, run in runs.items():
        rows = [passes.one(run) for _ in range(WARM_UP + rounds)][WARM_UP:]
        calls = passes.calls(run)
        take_back, outputs = run()
        found[name] = rows, calls, nodes(outputs)
        take_back()
    return found


def figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds by part, calls and nodes of each run, over all turns."""
    found: dict[str, Any] = {}
    for name, (_, calls, operations) in turns[0].items():
        rows = [row for turn in turns for row in turn[name][0]]
        columns = dict(zip(PARTS, zip(*rows, strict=True), strict=True))
        columns["all"] = tuple(sum(row[:3]) for row in rows)
        found[name] = {
            part: {
                "ms": 1e3 * statistics.median(column),
                "ms_min": 1e3 * min(column),
                "ms_max": 1e3 * max(column),
            }
            for part, column in columns.items()
        } | {"calls": calls, "nodes": operations}
    return found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=shape_names())
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES), help="of the shape")
    parser.add_argument("--layers", type=int, default=32, help="of the tiny model")
    parser.add_argument("--kernel", action="append", default=[], metavar="OP=CHOICE")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10, help="a turn")
    options = parser.parse_args()
    builder, vocab, kept = subject(options)  # the drafter's folder goes with what is kept
    kernels = dict(text.split("=", 1) for text in options.kernel)
    prompt = mx.random.randint(0, vocab, (1, options.context), key=mx.random.key(1))
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "shape": options.shape or f"tiny hybrid of {options.layers} layers, float32",
        "kernels": kernels,
        "context": options.context,
        "rounds": options.rounds * TURNS,
        "settings": {},
    }
    turns: dict[str, list[dict[str, Any]]] = {"off": [], "on": []}
    for _ in range(TURNS):  # a model serves one pipeline at a time
        for choice, taken in turns.items():
            switches = {"compiled-pass": choice, "compiled-draft": choice}
            with builder.kernels(kernels | switches).build() as pipeline:
                taken.append(measure(pipeline, prompt, vocab, options.rounds))
                why_not = pipeline._parts.target.compiled.why_not
            report["settings"][choice] = {"runs": figures(taken), "why_not": why_not}
    for choice, setting in report["settings"].items():
        for name, found in setting["runs"].items():
            times = ", ".join(f"{part} {found[part]['ms']:.2f}" for part in (*PARTS, "all"))
            counts = f"{found['calls']} calls, {found['nodes']} nodes"
            print(f"{choice}, {name}: {times} ms; {counts}")
    del kept
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
