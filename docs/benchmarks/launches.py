"""What a launch costs the host: chains of one operation, put together, handed over, waited for.

    python docs/benchmarks/launches.py OUT.json
    MLX_MAX_OPS_PER_BUFFER=200 python docs/benchmarks/launches.py OUT.json

MLX hands launches over as graphs of so many of them; it reads that number from the environment.
Microseconds a launch, medians. CUDA only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from draftloom.apps.bench.report import machine
from draftloom.kernels import few_rows
from draftloom.kernels.compiled_cuda import cuda_kernel
from draftloom.versions import version_of

LAUNCHES, ROUNDS, WARM_UP = 200, 25, 5
ROWS, SIZE = 16, 2560

Step = Callable[[mx.array], mx.array]


def copies(make: Any, inputs: int, outputs: int) -> Step:
    """A kernel that copies its first input to every output."""
    names = [f"in{i}" for i in range(inputs)], [f"out{i}" for i in range(outputs)]
    at = "int i = blockIdx.x * blockDim.x + threadIdx.x;"
    given = " + ".join(["in0[i]", *(f"{name}[0]" for name in names[0][1:])])
    written = " ".join(f"{name}[i] = {given};" for name in names[1])
    kernel = make(
        name=f"copies_{inputs}_{outputs}",
        input_names=names[0],
        output_names=names[1],
        source=f"{at} if (i < {ROWS * SIZE}) {{ {written} }}",
    )
    more = [mx.zeros((4,)) for _ in names[0][1:]]
    mx.eval(more)

    def step(x: mx.array) -> mx.array:
        found: list[mx.array] = kernel(
            inputs=[x, *more],
            template=[],
            grid=(ROWS * SIZE, 1, 1),
            threadgroup=(256, 1, 1),
            output_shapes=[x.shape] * outputs,
            output_dtypes=[mx.float32] * outputs,
        )
        return found[0]

    return step


def phases(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds to put something together, to hand it over, and from then on until all is there."""
    mx.synchronize()
    begin = time.perf_counter()
    found = run()
    built = time.perf_counter()
    mx.async_eval(found)
    launched = time.perf_counter()
    mx.synchronize()
    end = time.perf_counter()
    return {"build": built - begin, "launch": launched - built, "all": end - built}


def timed(step: Step, start: mx.array) -> dict[str, float]:
    """Microseconds a launch of a chain."""

    def chain() -> mx.array:
        x = start
        for _ in range(LAUNCHES):
            x = step(x)
        return x

    taken = [phases(chain) for _ in range(ROUNDS + WARM_UP)][WARM_UP:]
    return {
        what: 1e6 * statistics.median(one[what] for one in taken) / LAUNCHES for what in taken[0]
    }


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    single = mx.random.normal((ROWS, SIZE))
    half = mx.random.normal((1, ROWS, SIZE)).astype(mx.bfloat16)
    weight = (0.02 * mx.random.normal((SIZE, SIZE))).astype(mx.bfloat16)
    scale = mx.ones((SIZE,), dtype=mx.bfloat16)
    mx.eval(single, half, weight, scale)
    own, mlx = cuda_kernel, mx.fast.cuda_kernel
    cases: dict[str, tuple[Step, mx.array]] = {
        "addition": (lambda x: x + half, half),
        "RMS norm": (lambda x: mx.fast.rms_norm(x, scale, 1e-6), half),
        "product of 16 rows": (lambda x: x @ weight.T, half),
        "few-rows": (lambda x: few_rows.product(x, weight, use="cuda"), half),
        "kernel of MLX's compiler, 1 input, 1 output": (copies(mlx, 1, 1), single),
        "3 inputs": (copies(mlx, 3, 1), single),
        "2 outputs": (copies(mlx, 1, 2), single),
        "kernel compiled by draftloom, 1 input, 1 output": (copies(own, 1, 1), single),
    }
    report: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx")},
        "launches_a_graph": os.environ.get("MLX_MAX_OPS_PER_BUFFER", "MLX's own"),
        "microseconds": {},
    }
    for name, (step, start) in cases.items():
        report["microseconds"][name] = timed(step, start)
        print(name, report["microseconds"][name], flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
