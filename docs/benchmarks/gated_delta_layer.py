"""Whole gated-delta layers, with each fused piece on and off.

    python docs/benchmarks/gated_delta_layer.py OUT.json [--shape tiny] [--dtype float32]

Layers of Qwen3.5-4B's shape (24, random weights, bfloat16, one row) run one after the other, as in
a model. A cycle is begin, verify of M tokens, one blocking read, and a commit of half of them; a
step of M = 1 is plain decoding. Times are wall time over the number of layers, microseconds: median
and spread of rounds in which the variants take turns, so that a drifting clock hits all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache

from draftloom.adapters.gated_delta import RecordingMixer, project_qwen3_5
from draftloom.adapters.packed import PackedModel
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.kernel_settings import KernelSettings

SHAPES = {
    "4b": (24, 2560, 16, 32, 128),
    "tiny": (4, 64, 1, 2, 32),
}
"""Layers, hidden size, key heads, value heads, head size."""


class Layers(nn.Module):
    """Gated-delta mixers in a row, with a residual around each."""

    def __init__(self, shape: str, dtype: mx.Dtype) -> None:
        super().__init__()
        count, hidden, key_heads, value_heads, size = SHAPES[shape]
        config = qwen3_5.TextModelArgs(
            hidden_size=hidden,
            linear_num_key_heads=key_heads,
            linear_num_value_heads=value_heads,
            linear_key_head_dim=size,
            linear_value_head_dim=size,
        )
        self.mixers = [qwen3_5.GatedDeltaNet(config) for _ in range(count)]
        self.set_dtype(dtype)
        mx.eval(self.parameters())

    def stand_ins(self, settings: KernelSettings) -> list[RecordingMixer]:
        """The mixers as an adapter wraps them."""
        made = [RecordingMixer(mixer, project_qwen3_5) for mixer in self.mixers]
        for mixer in made:
            mixer.tune(settings)
        return made


def variants() -> dict[str, dict[str, str]]:
    """What is switched on: by name, choices of kernels."""
    kernel = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "array"
    inputs, norm = {"gated-delta-inputs": kernel}, {"gated-norm": kernel}
    waits, packed = {"replay-verify": "on"}, {"packed-projections": "gated-delta"}
    return {
        "recurrence only": {},
        "inputs": inputs,
        "norm": norm,
        "replay waits": waits,
        "packed": packed,
        "inputs, norm": inputs | norm,
        "inputs, norm, replay waits": inputs | norm | waits,
        "everything": inputs | norm | waits | packed,
    }


def run(mixers: list[RecordingMixer], caches: list[Any], x: mx.array) -> mx.array:
    """All layers over x [1, M, D]."""
    for mixer, cache in zip(mixers, caches, strict=True):
        x = x + 0.1 * mixer(x, None, cache)
    return x


def cycle(
    mixers: list[RecordingMixer], rollback: TapeReplayRollback, caches: list[Any], x: mx.array
) -> tuple[float, float]:
    """Seconds of begin, verify and the read; and of the commit."""
    start = time.perf_counter()
    block = mx.zeros(x.shape[:2], dtype=mx.int32)
    speculations = [rollback.begin(cache, block) for cache in caches]
    mx.eval(run(mixers, [one.entry for one in speculations], x))
    read = time.perf_counter()
    if x.shape[1] > 1:
        started: list[mx.array] = []
        for one in speculations:
            one.commit((x.shape[1] // 2 - 1,))
            started += getattr(one, "started", ())
        mx.async_eval(started)
    return read - start, time.perf_counter() - read


def summary(seconds: list[float], layers: int) -> dict[str, float]:
    """Microseconds a layer."""
    us = sorted(1e6 * x / layers for x in seconds)
    return {"us": statistics.median(us), "us_min": us[0], "us_max": us[-1]}


def measure(layers: Layers, tokens: int, rounds: int) -> dict[str, Any]:
    """Every variant at one width; in each round each of them runs a few cycles, in random order."""
    hidden = layers.mixers[0].hidden_size
    dtype = layers.mixers[0].out_proj.weight.dtype
    x = mx.random.normal((1, tokens, hidden)).astype(dtype)
    mx.eval(x)
    order = random.Random(1)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in variants()}
    for turn in range(rounds + 1):
        names = list(found)
        order.shuffle(names)
        for name in names:
            settings = KernelSettings.of(variants()[name])
            packing = PackedModel(layers)
            packing.tune(settings)
            mixers, rollback = layers.stand_ins(settings), TapeReplayRollback()
            rollback.tune(settings)
            caches = [ArraysCache(2) for _ in mixers]
            for _ in range(3):
                cycle(mixers, rollback, caches, x)
            for _ in range(5 if turn else 0):  # the first turn compiles
                verify, commit = cycle(mixers, rollback, caches, x)
                found[name][0].append(verify)
                found[name][1].append(commit)
            packing.restore()
    count = len(layers.mixers)
    return {
        name: {"verify": summary(verify, count), "commit": summary(commit, count)}
        for name, (verify, commit) in found.items()
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    mx.random.seed(7)
    layers = Layers(options.shape, getattr(mx, options.dtype))
    report: dict[str, Any] = {
        "device": mx.device_info().get("device_name", str(mx.default_device())),
        "default_device": str(mx.default_device()),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "shape": dict(
            zip(("layers", "hidden", "Hk", "Hv", "D"), SHAPES[options.shape], strict=True)
        ),
        "dtype": options.dtype,
        "variants": variants(),
        "times": {},
    }
    for tokens in (1, 16):
        report["times"][f"M={tokens}"] = measure(layers, tokens, options.rounds)
        for name, times in report["times"][f"M={tokens}"].items():
            verify, commit = times["verify"], times["commit"]
            print(
                f"M={tokens} {name}: {verify['us']:.1f} us a layer "
                f"({verify['us_min']:.1f}-{verify['us_max']:.1f}), commit {commit['us']:.1f}"
            )
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
