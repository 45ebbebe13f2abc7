"""What verify attention takes of the device alone: ``python docs/benchmarks/verify_attention_device.py OUT.json``.

The shape, the ways and the caches of `verify_attention.py` beside it: 24 calls, each on the output
of the one before, three times after a warm-up. Times are those of the kernels, read by CUPTI
through PyTorch's profiler (PyTorch is no dependency of this project), and summed over a call. So
the host, which hands each kernel over, is not in them.
"""  # noqa: E501 a command on one line

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from verify_attention import ROTATED, Attend, Shape, Way, causal, chained, kernel, masked

from draftloom.apps.bench.report import machine
from draftloom.kernels.verify_attention import cuda
from draftloom.versions import version_of

CALLS, ROUNDS = 24, 3
LENGTHS = (1024, 4096, 16384)


def device_us(way: Way, q: mx.array, held: list[list[mx.array]], length: int) -> dict[str, Any]:
    """Microseconds a call, in all and by kernel."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        mx.eval(chained(way, q, held, length, CALLS))
    mx.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            mx.eval(chained(way, q, held, length, CALLS))
        mx.synchronize()
    kernels: dict[str, float] = defaultdict(float)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            kernels[event.name[:80]] += event.time_range.elapsed_us() / (CALLS * ROUNDS)
    return {"us": sum(kernels.values()), "kernels": dict(kernels)}


def main() -> None:
    """Measure, print, and write the JSON."""
    shape = Shape(16, 4, 256, 16, 1, mx.bfloat16)
    ours: Attend = kernel(shape, "cuda", cuda.LAUNCHER)
    ways = [Way("kernel", ours, True), Way("masked", masked(shape)), Way("causal", causal(shape))]
    versions = {name: version_of(name) for name in ("draftloom", "mlx")}
    report: dict[str, Any] = {"machine": machine(), "versions": versions, "keys": {}}
    for length in LENGTHS:
        caches = max(2, min(ROTATED // shape.bytes_of(length), CALLS))
        q = shape.normal(shape.heads, shape.queries)
        held = [[shape.normal(shape.key_heads, length) for _ in "kv"] for _ in range(caches)]
        mx.eval(q, held)
        found = {way.name: device_us(way, q, held, length) for way in ways}
        report["keys"][str(length)] = found
        print(length, {name: round(one["us"], 1) for name, one in found.items()}, flush=True)
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
