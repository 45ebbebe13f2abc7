"""Texts of the bundled pair, settings in turns; behind each text the pass that times its stages.

    python docs/benchmarks/texts_in_turns.py OUT.json --width 15 --width auto \\
        --setting defaults --setting "off: qk-norm-rope=off"

In each turn every setting's pipeline is built for every width, writes a text that is not timed, and
then the prompts. "host_ms" is what the same loop of Python takes just before a text: it says what
the host is like at that time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from cycles import text
from step_of_a_shape import named

from draftloom import PipelineBuilder
from draftloom.apps.bench.prompts import EncodedPrompt, load_suite
from draftloom.apps.bench.report import machine
from draftloom.apps.bench.stages import time_stages
from draftloom.pipeline import Pipeline
from draftloom.versions import version_of


def host() -> float:
    """Milliseconds of a loop of Python."""
    begin, total = time.perf_counter(), 0
    for i in range(200_000):
        total += i * i
    return 1e3 * (time.perf_counter() - begin)


def staged(pipeline: Pipeline, prompt: EncodedPrompt, tokens: int) -> dict[str, float]:
    """One text, and how it stands to what its stages take."""
    before, found = host(), text(pipeline, prompt.ids, tokens)
    (limit,) = time_stages("", pipeline, [prompt], tokens).limits
    cycles = sorted(found["cycles"])
    return {
        "host_ms": before,
        "tokens_per_second": found["tokens_per_second"],
        "tokens_per_cycle": found["tokens_per_cycle"],
        "cycle_ms": found["median_ms"],
        "quiet_cycle_ms": cycles[len(cycles) // 10],
        "efficiency": found["tokens_per_second"] / limit if limit else 0.0,
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", action="append", metavar="'NAME: OP=CHOICE ...'")
    parser.add_argument("--width", action="append", help="a number, or a policy")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4)
    options = parser.parse_args()
    settings = dict(map(named, options.setting or ["defaults"]))
    ways = [(name, width) for name in settings for width in options.width or ["15"]]
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "texts": [],
    }
    for turn in range(options.turns):
        at = turn % len(ways)
        for name, width in (*ways[at:], *ways[:at]):
            builder = PipelineBuilder().width(int(width) if width.isdigit() else width)
            with builder.kernels(settings[name]).build() as pipeline:
                prompts = [
                    EncodedPrompt("code", pipeline.encode(one.text))
                    for one in load_suite("code", options.prompts)
                ]
                pipeline.generate(list(prompts[0].ids), max_tokens=options.tokens, ignore_eos=True)
                time_stages("", pipeline, prompts[:1], options.tokens // 4)
                for index, prompt in enumerate(prompts):
                    found = staged(pipeline, prompt, options.tokens)
                    row = {"turn": turn, "setting": name, "width": width, "prompt": index, **found}
                    report["texts"].append(row)
                    print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
