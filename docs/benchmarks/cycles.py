"""Every cycle of texts at the shape of a public model; settings and mlx-lm alone take turns.

    python docs/benchmarks/cycles.py OUT.json --setting defaults \\
        --setting "ahead: compiled-draft=ahead" --turns 3

Random weights, and an acceptance drawn with probability 0.88. A setting is a name and what kernels
it chooses, everything else as `auto` has it. In each turn a setting's pipeline is built and writes
two texts; the first cycles of the first trace what is traced. "cycles" are their milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from step_of_a_shape import named

from draftloom import PipelineBuilder
from draftloom.apps.bench.report import machine
from draftloom.apps.bench.simulate import (
    DTYPES,
    random_prompts,
    shape_names,
    simulated_subject,
)
from draftloom.apps.bench.subjects import Simulation
from draftloom.pipeline import Pipeline
from draftloom.versions import version_of

TEXTS = 2


def alone(model: Any, prompt: tuple[int, ...], tokens: int) -> float:
    """Tokens a second of mlx-lm, from the first token on."""
    begin = 0.0
    for count, _ in enumerate(generate_step(mx.array(prompt), model, max_tokens=tokens)):
        if not count:
            begin = time.perf_counter()
    return (tokens - 1) / (time.perf_counter() - begin)


def text(pipeline: Pipeline, prompt: tuple[int, ...], tokens: int) -> dict[str, Any]:
    """What one text took, from the first token on."""
    begin, written, cycles = 0.0, 0, []
    for chunk in pipeline.stream(list(prompt), max_tokens=tokens, ignore_eos=True, temperature=0.0):
        if not begin:
            begin = time.perf_counter()
            continue
        cycles.append(1e3 * chunk.cycle.seconds)
        written += len(chunk.token_ids)
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": written / seconds,
        "tokens_per_cycle": written / len(cycles),
        "median_ms": statistics.median(cycles),
        "cycles": cycles,
    }


def texts(builder: PipelineBuilder, prompt: tuple[int, ...], tokens: int) -> list[dict[str, Any]]:
    """What each text of a pipeline took."""
    with builder.build() as pipeline:
        return [text(pipeline, prompt, tokens) for _ in range(TEXTS)]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="qwen3.5-4b", choices=shape_names())
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--setting", action="append", metavar="'NAME: OP=CHOICE ...'")
    parser.add_argument("--width", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    simulation = Simulation(options.shape, (0.88,))
    subject = simulated_subject(simulation, options.dtype, [("own", options.width)])
    builder = subject.variants[-1].builder
    assert builder is not None
    prompt = random_prompts(simulation, subject.vocab_size, 1)[0].ids
    settings = dict(map(named, options.setting or ["defaults"]))
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "shape": options.shape,
        "tokens": options.tokens,
        "turns": [],
    }
    for turn in range(options.turns):
        found: dict[str, Any] = {"mlx-lm": alone(subject.model, prompt, options.tokens)}
        print(f"{turn + 1}: mlx-lm {found['mlx-lm']:.1f} tokens/s", flush=True)
        for name, kernels in settings.items():
            found[name] = written = texts(builder.kernels(kernels), prompt, options.tokens)
            for text in written:
                print(
                    f"{turn + 1}: {name}: {text['tokens_per_second']:.1f} tokens/s, "
                    f"{text['tokens_per_cycle']:.2f} a cycle of {text['median_ms']:.2f} ms",
                    flush=True,
                )
        report["turns"].append(found)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
