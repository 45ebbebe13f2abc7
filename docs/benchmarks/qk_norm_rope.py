"""What ``qk-norm-rope`` is worth: on the host, and in all.

    python docs/benchmarks/qk_norm_rope.py OUT.json

Norms and rotary positions of eight layers' queries and keys, traced by `mx.compile` as a model's
pass is. "host" is the time until the launches are handed over, "all" until their results are there;
each divided by the layers, in microseconds. Ways take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from launches import phases

from draftloom.apps.bench.report import machine
from draftloom.kernels import qk_norm_rope
from draftloom.kernels.qk_norm_rope import Heads, Rotation
from draftloom.versions import version_of

LAYERS = 8


def heads(layers: int, tokens: int, gated: bool, use: Any) -> Callable[[], mx.array]:
    """Queries and keys of packed products, at one position."""
    shape = Heads(16, 4, 256, 512 if gated else 256)
    norms = [(nn.RMSNorm(256), nn.RMSNorm(256)) for _ in range(layers)]
    for pair in norms:
        for norm in pair:
            norm.weight = norm.weight.astype(mx.bfloat16)
    width = shape.ends[1] + 4 * 256
    products = [mx.random.normal((1, tokens, width)).astype(mx.bfloat16) for _ in norms]
    rope, offset = nn.RoPE(64, base=1e7), mx.array(300)
    mx.eval(products, offset, [norm.weight for pair in norms for norm in pair])

    def run(products: list[mx.array], offset: mx.array) -> list[mx.array]:
        rotation, found = Rotation(rope, offset), []
        for product, pair in zip(products, norms, strict=True):
            found += qk_norm_rope.place(product, shape, pair, rotation, use=use)
        return found

    traced = mx.compile(run)
    return lambda: traced(products, offset)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until it is handed over, and until it is there."""
    found = phases(run)
    return found["build"] + found["launch"], found["build"] + found["all"]


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kernel", default="cuda")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    cases: dict[str, dict[str, Callable[[], Any]]] = {}
    for tokens in (1, 16):
        for name, gated in (("qk-norm-rope", False), ("qk-norm-rope, gated", True)):
            ways = {use: heads(LAYERS, tokens, gated, use) for use in ("array", options.kernel)}
            cases[f"{name}, {tokens} tokens"] = ways
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx")},
        "microseconds": {},
    }
    for name, ways in cases.items():
        times: dict[str, list[tuple[float, float]]] = {use: [] for use in ways}
        for turn in range(options.rounds + 5):
            for use, run in ways.items():
                found = timed(run)
                if turn >= 5:
                    times[use].append(found)
        report["microseconds"][name] = {
            use: {
                what: 1e6 * statistics.median(one[at] for one in taken) / LAYERS
                for at, what in enumerate(("host", "all"))
            }
            for use, taken in times.items()
        }
        print(name, report["microseconds"][name], flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
