"""Times the gated delta kernels: ``python docs/benchmarks/gated_delta.py OUT.json``.

Shape of Qwen3.5-4B: 16 key heads, 32 value heads, 128 x 128, bfloat16, one row. A time is that of
one launch among many evaluated together (wall time of the evaluation over the number of launches;
building the graph in Python is timed apart), the median of several rounds after a warm-up. "chain"
launches depend on one another through one state, which stays in the cache; "layers" runs through 24
states, as a model does.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_ops

from draftloom.kernels.gated_delta import Tape, chunked, cuda, metal, reference, row_counts
from draftloom.kernels.gated_delta.launch import Backend, Geometry, Launcher, geometry_for
from draftloom.kernels.gated_delta.source import Variant

KEY_HEADS, VALUE_HEADS, SIZE, LAYERS = 16, 32, 128, 24

# The simple kernel that the bars are set against: one row of the state a simdgroup, 32 lanes over
# Dk.
PLAIN = """
  const int lane = static_cast<int>(thread_index_in_simdgroup);
  const int row = static_cast<int>(threadgroup_position_in_grid.y) * 4
      + static_cast<int>(simdgroup_index_in_threadgroup);
  const int n = static_cast<int>(threadgroup_position_in_grid.z);
  const int batch = n / Hv;
  const int head = n % Hv;
  const int key_head = head / (Hv / Hk);
  const int tokens = beta_shape[1];
  constexpr int PER = Dk / 32;
  float state[PER];
  for (int i = 0; i < PER; ++i) {
    state[i] = state_in[(static_cast<size_t>(n) * Dv + row) * Dk + PER * lane + i];
  }
  for (int t = 0; t < tokens; ++t) {
    const size_t at = static_cast<size_t>(batch) * tokens + t;
    auto k_row = k + (at * Hk + key_head) * Dk + PER * lane;
    auto q_row = q + (at * Hk + key_head) * Dk + PER * lane;
    const float decay = static_cast<float>(g[at * Hv + head]);
    float memory = 0.0f;
    for (int i = 0; i < PER; ++i) {
      state[i] *= decay;
      memory += state[i] * static_cast<float>(k_row[i]);
    }
    for (int bit = 1; bit < 32; bit <<= 1) {
      memory += simd_shuffle_xor(memory, bit);
    }
    const float delta = (static_cast<float>(v[(at * Hv + head) * Dv + row]) - memory)
        * static_cast<float>(beta[at * Hv + head]);
    float out = 0.0f;
    for (int i = 0; i < PER; ++i) {
      state[i] += static_cast<float>(k_row[i]) * delta;
      out += state[i] * static_cast<float>(q_row[i]);
    }
    for (int bit = 1; bit < 32; bit <<= 1) {
      out += simd_shuffle_xor(out, bit);
    }
    if (lane == 0) {
      y[(at * Hv + head) * Dv + row] = static_cast<QT>(out);
    }
  }
  for (int i = 0; i < PER; ++i) {
    state_out[(static_cast<size_t>(n) * Dv + row) * Dk + PER * lane + i] = state[i];
  }
"""


def backend() -> Backend:
    """The GPU backend of this machine."""
    return metal.BACKEND if mx.metal.is_available() else cuda.BACKEND


@lru_cache
def _plain_kernel():
    chosen = backend()
    return chosen.build(
        name="draftloom_plain_gated_delta",
        input_names=["q", "k", "v", "g", "beta", "state_in"],
        output_names=["y", "state_out"],
        source=PLAIN,
        header=chosen.prelude,
    )


def plain(q, k, v, g, beta, state):
    """The simple kernel; returns y and the state."""
    heads, value, key = state.shape[1:]
    return _plain_kernel()(
        inputs=[q, k, v, g, beta, state],
        template=[("QT", q.dtype), ("Hk", k.shape[2]), ("Hv", heads), ("Dk", key), ("Dv", value)],
        grid=(32, value, state.shape[0] * heads),
        threadgroup=(32, 4, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[q.dtype, mx.float32],
    )


def inputs(tokens: int, dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, ...]:
    """q, k, v, g, beta and the state, random, in the model's ranges."""

    def unit(x: mx.array) -> mx.array:
        return x / mx.sqrt((x * x).sum(axis=-1, keepdims=True))

    q = unit(mx.random.normal((1, tokens, KEY_HEADS, SIZE))) * SIZE**-0.5
    k = unit(mx.random.normal((1, tokens, KEY_HEADS, SIZE)))
    v = mx.random.normal((1, tokens, VALUE_HEADS, SIZE))
    g = mx.random.uniform(0.8, 1.0, (1, tokens, VALUE_HEADS))
    beta = mx.random.uniform(0.0, 1.0, (1, tokens, VALUE_HEADS))
    state = mx.random.normal((1, VALUE_HEADS, SIZE, SIZE))
    out = (*(x.astype(dtype) for x in (q, k, v)), g, beta.astype(dtype), state)
    mx.eval(out)
    return out


def launches(build: Callable[[], list[mx.array]], count: int, rounds: int) -> dict[str, float]:
    """Microseconds a launch of ``build``, which makes ``count`` launches: median and spread, and
    Python's share.
    """
    mx.eval(build())
    mx.synchronize()
    evaluated, built = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        arrays = build()
        middle = time.perf_counter()
        mx.eval(arrays)
        mx.synchronize()
        built.append((middle - start) / count * 1e6)
        evaluated.append((time.perf_counter() - middle) / count * 1e6)
    return {
        "us": statistics.median(evaluated),
        "us_min": min(evaluated),
        "us_max": max(evaluated),
        "python_us": statistics.median(built),
        "launches": count,
    }


def chain(
    step: Callable[[mx.array], tuple[mx.array, list[mx.array]]],
    state: mx.array,
    count: int,
    rounds: int = 9,
):
    """Time ``count`` launches, each on the state that the one before wrote."""

    def build() -> list[mx.array]:
        kept, now = [], state
        for _ in range(count):
            now, extra = step(now)
            kept += extra
        return [now, *kept]

    return launches(build, count, rounds)


def layers(
    step: Callable[[mx.array], tuple[mx.array, list[mx.array]]], count: int, rounds: int = 9
):
    """Time ``count`` passes over LAYERS states."""
    states = [mx.random.normal((1, VALUE_HEADS, SIZE, SIZE)) for _ in range(LAYERS)]
    mx.eval(states)

    def build() -> list[mx.array]:
        kept, now = [], list(states)
        for _ in range(count):
            for i in range(LAYERS):
                now[i], extra = step(now[i])
                kept += extra
        return [*now, *kept]

    return launches(build, count * LAYERS, rounds)


def blocks(launcher: Launcher) -> dict[str, dict[str, float]]:
    """The block kernels at T = 1 and T = 16."""
    found = {}
    for tokens in (1, 16):
        *block, state = inputs(tokens)
        _, tape, _ = launcher.verify(*block, state)
        mx.eval(tape.delta)
        counts = row_counts(max(tokens // 2, 1), 1)

        def verify(s, block=block):
            y, tape, end = launcher.verify(*block, s)
            return end, [y, tape.delta]

        def replay(s, tape=tape, counts=counts):
            return launcher.replay(s, tape, counts), []

        def fused(s, block=block, tape=tape, counts=counts):
            y, new, middle, _ = launcher.replay_verify(tape, counts, tuple(block), s)
            return middle, [y, new.delta]

        def simple(s, block=block):
            y, end = plain(*block, s)
            return end, [y]

        for name, step in (
            ("verify", verify),
            ("replay", replay),
            ("fused", fused),
            ("plain", simple),
        ):
            found[f"{name} T={tokens} chain"] = chain(step, state, 200)
            found[f"{name} T={tokens} layers"] = layers(step, 8)
    return found


def prompts(launcher: Launcher) -> dict[str, dict[str, float]]:
    """Prefill of 2048 tokens, by every implementation."""
    found = {}
    for tokens in (2048,):
        *block, state = inputs(tokens)
        runs = {
            "kernel": lambda s, b=block: launcher.prefill(*b, s),
            "plain": lambda s, b=block: plain(*b, s),
            "chunked 64": lambda s, b=block: chunked.prefill(*b, s),
            "chunked 128": lambda s, b=block: chunked.prefill(*b, s, chunk=128),
        }
        for name, run in runs.items():

            def step(s, run=run):
                y, end = run(s)
                return end, [y]

            found[f"prefill {name} T={tokens}"] = chain(step, state, 8, rounds=5)

        def stock(s, b=block):
            y, end = gated_delta_ops(*b, s)
            return end, [y]

        found[f"prefill mlx-lm off Metal T={tokens}"] = chain(stock, state, 1, rounds=3)
    return found


def errors(launcher: Launcher) -> dict[str, float]:
    """Relative errors against the float32 reference on the CPU, 63 tokens."""
    *block, state = inputs(63)
    with mx.stream(mx.cpu):
        truth = reference.run(*block, state)
        mx.eval(truth.y, truth.states, truth.tape.delta)

    def relative(x: mx.array, exact: mx.array) -> float:
        with mx.stream(mx.cpu):
            gap = x.astype(mx.float32) - exact
            return mx.sqrt((gap * gap).sum() / (exact * exact).sum()).item()

    found = {}
    y, tape, end = launcher.verify(*block, state)
    for name, x, exact in (
        ("y", y, truth.y),
        ("delta", tape.delta, truth.tape.delta),
        ("state", end, truth.states[:, -1]),
    ):
        found[f"kernel {name}"] = relative(x, exact)
    y, end = chunked.prefill(*block, state)
    found["chunked y"], found["chunked state"] = (
        relative(y, truth.y),
        relative(end, truth.states[:, -1]),
    )
    return found


GEOMETRIES = (
    (8, 1, 8, 32, 1),
    (8, 1, 8, 32, 2),
    (8, 1, 8, 32, 4),
    (8, 1, 4, 32, 2),
    (8, 1, 4, 16, 2),
)


def profile(labels: Path) -> None:
    """Launch every case a few times for a profiler (see ``merge``), writing what was launched."""
    launched: list[str] = []
    *short, state = inputs(16)
    *long, _ = inputs(2048)
    launcher = Launcher(backend())
    _, tape, _ = launcher.verify(*short, state)
    counts, single = row_counts(8, 1), mx.array([8])
    mx.eval(tape.delta, counts, single)
    by_hand = [tape.delta, tape.k, tape.g, single, state]
    cases = {
        "verify T=16": lambda: launcher.verify(*short, state),
        "verify T=16, no state written": lambda: launcher.verify(*short, state, write_state=False),
        "verify T=1": lambda: launcher.verify(*[x[:, :1] for x in short], state),
        "replay n=8": lambda: [launcher.replay(state, tape, counts)],
        "replay n=8, counts in host memory": lambda: launcher._run(
            Variant(replay=True, middle=True), list(by_hand), tape.k, tape.delta
        ).values(),
        "replay n=8 and verify T=16": lambda: launcher.replay_verify(
            tape, counts, tuple(short), state
        ),
        "plain T=16": lambda: plain(*short, state),
        "plain T=2048": lambda: plain(*long, state),
        "prefill T=2048": lambda: launcher.prefill(*long, state),
    }
    for values in GEOMETRIES:
        tried = Launcher(backend(), Geometry(*values))
        cases[f"{values} T=16"] = lambda tried=tried: tried.verify(*short, state)
        cases[f"{values} T=2048"] = lambda tried=tried: tried.prefill(*long, state)
    launched.append("verify T=16 (warm-up)")
    for name, run in cases.items():
        for _ in range(4):
            mx.eval([x.delta if isinstance(x, Tape) else x for x in run() if x is not None])
            launched.append(name)
    labels.write_text(json.dumps(launched))


def merge(table: Path, labels: Path) -> dict[str, float]:
    """Median microseconds by case, from ``ncu --csv`` output and the labels of ``profile``."""
    lines = [line for line in table.read_text().splitlines() if line.startswith('"')]
    times = [
        float(row["Metric Value"].replace(",", ""))
        * {"ns": 1e-3, "us": 1.0, "ms": 1e3}[row["Metric Unit"]]
        for row in csv.DictReader(lines)
        if row["Metric Name"] == "gpu__time_duration.sum"
    ]
    found: dict[str, list[float]] = {}
    for name, value in zip(json.loads(labels.read_text()), times, strict=True):
        found.setdefault(name, []).append(value)
    return {name: statistics.median(values[1:] or values) for name, values in found.items()}


def best(found: dict[str, float]) -> tuple[str, str]:
    """The fastest geometries at T = 16 and T = 2048 among those with the same number of lanes."""

    def lowest(tokens: int, lanes: int) -> tuple[float, str]:
        tail = f" T={tokens}"
        return min(
            (value, name.removesuffix(tail))
            for name, value in found.items()
            if name.startswith(f"({lanes},") and name.endswith(tail)
        )

    choices = [
        (lowest(16, lanes)[0] * 20 + lowest(2048, lanes)[0], lanes)
        for lanes in sorted({geometry[0] for geometry in GEOMETRIES})
    ]
    lanes = min(choices)[1]
    return lowest(16, lanes)[1].strip("()"), lowest(2048, lanes)[1].strip("()")


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", action="store_true", help="launch cases for a profiler")
    parser.add_argument("--merge", type=Path, help="ncu's CSV, to merge with the labels in OUT")
    parser.add_argument("--kernels", type=Path, help="a merged table to include")
    parser.add_argument("--short", help="geometry for blocks: lanes, rows, simds, tile, unroll")
    parser.add_argument("--long", help="geometry for prompts")
    options = parser.parse_args()
    mx.random.seed(7)
    short, long = (
        Geometry(*map(int, x.split(","))) if x else None for x in (options.short, options.long)
    )
    if options.profile:
        profile(options.out)
        return
    if options.merge:
        found = merge(options.merge, options.out)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        for name, value in found.items():
            print(f"{name}: {value:.2f} us")
        if any(name.startswith("(") for name in found):
            print("best:", *[x.replace(" ", "") for x in best(found)])
        return
    report = {
        "device": mx.device_info(mx.gpu).get("device_name", "unknown"),
        "backend": backend().name,
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "shape": {
            "Hk": KEY_HEADS,
            "Hv": VALUE_HEADS,
            "Dk": SIZE,
            "Dv": SIZE,
            "dtype": "bfloat16",
            "B": 1,
        },
        "geometry": {
            "T=16": str(short or geometry_for(SIZE, backend().memory)),
            "T=2048": str(long or geometry_for(SIZE, backend().memory)),
        },
        "errors": errors(Launcher(backend(), short)),
    }
    print(json.dumps(report["errors"]), flush=True)
    report["times"] = {**blocks(Launcher(backend(), short)), **prompts(Launcher(backend(), long))}
    for name, found in report["times"].items():
        print(
            f"{name}: {found['us']:.1f} us ({found['us_min']:.1f}-{found['us_max']:.1f}), "
            f"python {found['python_us']:.1f}"
        )
    if options.kernels:
        report["kernel_us_by_profiler"] = json.loads(options.kernels.read_text())
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
