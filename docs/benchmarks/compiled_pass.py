"""Where the time of a pass goes on the host, with ``compiled-pass`` off and on.

    python docs/benchmarks/compiled_pass.py OUT.json
    python docs/benchmarks/compiled_pass.py OUT.json --shape qwen3.5-4b [--kernel OP=CHOICE ...]

Without ``--shape``: a tiny random hybrid of many layers, float32, whose arithmetic is next to
nothing, so that it runs on a CPU. Of a pass of M tokens over a context, in milliseconds, medians
with the least and the most:

- build: opening the speculation and calling the target, until Python has the lazy outputs.
- launch: handing logits and features to the device (`mx.async_eval`).
- wait: until they are there.
- build CPU, launch CPU: the same by the clock of this thread's own work, which a busy machine does
  not lengthen.

Then the speculation is taken back, untimed. "calls" is how many functions of Python and of MLX
building a pass calls, "nodes" how many operations its graph has, counted in passes of their own.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
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
    Simulation,
    randomize,
    shape_names,
    simulated_subject,
)
from draftloom.versions import version_of

SIZES, WARM_UP = (1, 4, 16), 4
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


def subject(options: argparse.Namespace) -> tuple[PipelineBuilder, int]:
    """What is measured, and the size of its vocabulary."""
    if options.shape is not None:
        simulation = Simulation(options.shape, (1.0,))
        found = simulated_subject(simulation, options.dtype, [("own", None)])
        builder = found.variants[-1].builder
        assert builder is not None
        return builder, found.vocab_size
    config = TINY | {"num_hidden_layers": options.layers}
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    randomize(model, 0, mx.float32)
    return PipelineBuilder().model(model, None).drafter("none"), config["vocab_size"]


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
        self.target.forward(prompt, self.cache)
        mx.eval([array for _, array in tree_flatten([e.state for e in self.cache])])

    def look(self, block: mx.array) -> tuple[Any, list[mx.array]]:
        """The speculation, logits and features of a block, lazy."""
        speculation = self.parts.open_speculation(self.cache, block)
        output = self.parts.verifier.verify(self.target, block, speculation)
        return speculation, [a for a in (output.logits, output.features) if a is not None]

    def one(self, block: mx.array) -> tuple[float, ...]:
        """Seconds of each of `PARTS`."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        speculation, outputs = self.look(block)
        built, cpu_built = time.perf_counter(), time.thread_time()
        mx.async_eval(outputs)
        launched, cpu_launched = time.perf_counter(), time.thread_time()
        mx.eval(outputs)
        end = time.perf_counter()
        speculation.abort()
        cpu = cpu_built - cpu_start, cpu_launched - cpu_built
        return built - start, launched - built, end - launched, *cpu

    def calls(self, block: mx.array) -> int:
        """Functions that building a pass calls."""
        count = 0

        def counted(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            speculation, outputs = self.look(block)
        finally:
            sys.setprofile(None)
        mx.eval(outputs)
        speculation.abort()
        return count


def nodes(outputs: list[mx.array]) -> int:
    """Operations in the graph of lazy arrays: the rectangles of its drawing."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *outputs)
    return drawing.getvalue().count("rectangle")


def measure(pipeline: Any, prompt: mx.array, vocab: int, rounds: int) -> dict[str, Any]:
    """Figures by M."""
    passes = Passes(pipeline, prompt)
    found: dict[str, Any] = {}
    for tokens in SIZES:
        block = mx.random.randint(0, vocab, (1, tokens), key=mx.random.key(2))
        mx.eval(block)
        rows = [passes.one(block) for _ in range(WARM_UP + rounds)][WARM_UP:]
        columns = dict(zip(PARTS, zip(*rows, strict=True), strict=True))
        columns["all"] = tuple(sum(row[:3]) for row in rows)
        found[str(tokens)] = {
            part: {
                "ms": 1e3 * statistics.median(column),
                "ms_min": 1e3 * min(column),
                "ms_max": 1e3 * max(column),
            }
            for part, column in columns.items()
        } | {"calls": passes.calls(block)}
        speculation, outputs = passes.look(block)
        found[str(tokens)]["nodes"] = nodes(outputs)
        speculation.abort()
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
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    builder, vocab = subject(options)
    kernels = dict(text.split("=", 1) for text in options.kernel)
    prompt = mx.random.randint(0, vocab, (1, options.context), key=mx.random.key(1))
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "shape": options.shape or f"tiny hybrid of {options.layers} layers, float32",
        "kernels": kernels,
        "context": options.context,
        "rounds": options.rounds,
        "settings": {},
    }
    for choice in ("off", "on"):  # one after the other: a model serves one pipeline at a time
        with builder.kernels(kernels | {"compiled-pass": choice}).build() as pipeline:
            figures = measure(pipeline, prompt, vocab, options.rounds)
            compiled = pipeline._parts.target.compiled
            report["settings"][choice] = {
                "passes": figures,
                "replayed": compiled.replayed,
                "traced": compiled.traced,
                "why_not": compiled.why_not,
            }
        for tokens, found in report["settings"][choice]["passes"].items():
            times = ", ".join(f"{part} {found[part]['ms']:.2f}" for part in (*PARTS, "all"))
            counts = f"{found['calls']} calls, {found['nodes']} nodes"
            print(f"compiled-pass={choice} M={tokens}: {times} ms; {counts}")
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
