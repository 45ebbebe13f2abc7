"""Times verify attention: ``python docs/benchmarks/verify_attention.py OUT.json``.

Shape of the bar: 16 query heads, 4 key heads, head size 256, 16 query tokens, bfloat16, one row, at
256 to 16,384 keys. A time is that of one call among many evaluated together, each on the output of
the one before (wall time of the evaluation over the number of calls; building the graph in Python
is timed apart), the median of several rounds after a warm-up. "layers" runs through as many caches
as hold 256 MB, so that none is found in the L2 cache; "one cache" asks one again and again.

Compared are the kernel, MLX's own attention with a mask over all allocated keys, MLX's own with
"causal" over the valid keys, and all of these while the cache grows by a block an evaluation. The
floor is reading keys and values once, at the speed at which this machine copies.

``--implementation array`` runs MLX's own in the kernel's place (a rehearsal, on any device).
``--geometries`` times every geometry of the kernel that fits instead. ``--quick`` takes fewer
rounds, calls and blocks. The JSON is written after every number of keys and every geometry.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import attrs
import mlx.core as mx

from draftloom.kernels import verify_attention
from draftloom.kernels.backend import Backend
from draftloom.kernels.verify_attention import cuda, metal, reference
from draftloom.kernels.verify_attention.launch import (
    SIZES,
    Launcher,
    chosen_geometry,
    valid_lengths,
)
from draftloom.versions import version_of

Attend = Callable[[mx.array, mx.array, mx.array, int], mx.array]
"""(q [B, Hq, M, D], keys, values [B, Hkv, N, D], valid keys) -> [B, Hq, M, D]."""


@attrs.frozen
class Way:
    """One way of attending.

    Attributes:
        name: for the report.
        attend: the call.
        packed: whether its output lies in memory as [B, M, Hq, D].
    """

    name: str
    attend: Attend
    packed: bool = False


STEP = 256  # a cache grows by this many keys
ROTATED = 256 * 2**20  # bytes of keys and values to go round in


@attrs.frozen
class Shape:
    """What is timed.

    Attributes:
        heads, key_heads, size, queries, rows: Hq, Hkv, D, M, B.
        dtype: of all.
    """

    heads: int
    key_heads: int
    size: int
    queries: int
    rows: int
    dtype: mx.Dtype

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.size**-0.5)

    def bytes_of(self, keys: int) -> int:
        """Of keys and values."""
        return 2 * self.rows * self.key_heads * keys * self.size * self.dtype.size

    def normal(self, heads: int, tokens: int) -> mx.array:
        """[B, heads, tokens, D]."""
        return mx.random.normal((self.rows, heads, tokens, self.size)).astype(self.dtype)


def kernel(shape: Shape, use: str, launcher: Launcher | None = None) -> Attend:
    """The implementation on a cache's buffers."""
    made: dict[int, mx.array] = {}

    def attend(q: mx.array, k: mx.array, v: mx.array, length: int) -> mx.array:
        if length not in made:
            made.clear()
            made[length] = valid_lengths(length, shape.rows)
        if launcher is not None:
            return launcher.attend(q, k, v, made[length], scale=shape.scale)
        return verify_attention.attend(q, k, v, made[length], scale=shape.scale, use=use)

    return attend


def linked(y: mx.array, packed: bool) -> mx.array:
    """An output as the next call's queries. That of a kernel is taken as it lies in memory (a
    model's projection sees it so), since a copy is not what is asked."""
    return y.transpose(0, 2, 1, 3).reshape(y.shape) if packed else y


def chained(way: Way, q: mx.array, held: list[list[mx.array]], length: int, calls: int) -> mx.array:
    """The last of so many calls, each on the output of the one before, the caches in turns."""
    for call in range(calls):
        q = linked(way.attend(q, *held[call % len(held)], length), way.packed)
    return q


def masked(shape: Shape) -> Attend:
    """MLX's own over all allocated keys; one mask for all layers, as in a model."""
    made: dict[tuple[int, int], mx.array] = {}

    def attend(q: mx.array, k: mx.array, v: mx.array, length: int) -> mx.array:
        asked = (length, k.shape[2])
        if asked not in made:
            made.clear()
            lengths = mx.array([length] * shape.rows)
            made[asked] = reference.visible(lengths, q.shape[2], k.shape[2], None)[:, None]
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.scale, mask=made[asked])

    return attend


def causal(shape: Shape) -> Attend:
    """MLX's own over the valid keys, as mlx-lm calls it."""

    def attend(q: mx.array, k: mx.array, v: mx.array, length: int) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            q, k[..., :length, :], v[..., :length, :], scale=shape.scale, mask="causal"
        )

    return attend


def timed(build: Callable[[], mx.array], calls: int, rounds: int) -> dict[str, float]:
    """Microseconds a call of ``build``, which makes ``calls`` of them."""
    mx.eval(build())
    mx.synchronize()
    evaluated, built = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        end = build()
        middle = time.perf_counter()
        mx.eval(end)
        mx.synchronize()
        built.append((middle - start) / calls * 1e6)
        evaluated.append((time.perf_counter() - middle) / calls * 1e6)
    return {
        "us": statistics.median(evaluated),
        "us_min": min(evaluated),
        "us_max": max(evaluated),
        "python_us": statistics.median(built),
        "calls": calls,
    }


def fixed(
    shape: Shape, way: Way, length: int, caches: int, options: argparse.Namespace
) -> dict[str, float]:
    """Calls at one length, going round in ``caches`` of them."""
    allocated = -(-length // STEP) * STEP
    q = shape.normal(shape.heads, shape.queries)
    held = [[shape.normal(shape.key_heads, allocated) for _ in "kv"] for _ in range(caches)]
    mx.eval(q, held)

    return timed(
        lambda: chained(way, q, held, length, options.calls), options.calls, options.rounds
    )


def growing(shape: Shape, way: Way, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Evaluations of 8 calls each, as of 8 layers; the valid keys grow by a block before each."""
    blocks, layers = options.blocks, 8
    allocated = -(-(length + (blocks + 1) * shape.queries) // STEP) * STEP
    q = shape.normal(shape.heads, shape.queries)
    k, v = (shape.normal(shape.key_heads, allocated) for _ in "kv")
    mx.eval(q, k, v)
    times = []
    for block in range(blocks):
        start = time.perf_counter()
        mx.eval(chained(way, q, [[k, v]], length + block * shape.queries, layers))
        mx.synchronize()
        times.append((time.perf_counter() - start) / layers * 1e6)
    kept = times[2:]  # compiling is not what is asked
    return {
        "us": statistics.median(kept),
        "us_min": min(kept),
        "us_max": max(kept),
        "calls": layers,
    }


def copy_speed(size: int) -> float:
    """Bytes a second of reading and writing a large array."""
    x = mx.zeros((size // 2,), dtype=mx.bfloat16)
    mx.eval(x)
    rounds = []
    for _ in range(6):
        start = time.perf_counter()
        mx.eval(x + 1)
        mx.synchronize()
        rounds.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(rounds[1:])


def errors_at(shape: Shape, length: int) -> Callable[[Way], float]:
    """Relative errors at a length against the float32 reference on the CPU, run once."""
    allocated = -(-length // STEP) * STEP
    q = shape.normal(shape.heads, shape.queries)
    k, v = (shape.normal(shape.key_heads, allocated) for _ in "kv")
    mx.eval(q, k, v)
    with mx.stream(mx.cpu):
        exact = reference.attend(q, k, v, mx.array([length] * shape.rows), scale=shape.scale)
        mx.eval(exact)

    def error(way: Way) -> float:
        found = way.attend(q, k, v, length)
        mx.eval(found)
        with mx.stream(mx.cpu):
            gap = found.astype(mx.float32) - exact
            return float(mx.sqrt((gap * gap).sum() / (exact * exact).sum()).item())

    return error


def compare(
    shape: Shape, ours: Way, speed: float, options: argparse.Namespace
) -> Iterator[tuple[str, dict]]:
    """Every way at every length, with floors and ratios: (length, what was found)."""
    ways = (ours, Way("masked", masked(shape)), Way("causal", causal(shape)))
    for length in options.keys:
        start = time.perf_counter()
        floor = shape.bytes_of(length) / speed * 1e6
        caches = max(1, min(ROTATED // shape.bytes_of(-(-length // STEP) * STEP), options.calls))
        entry: dict = {"floor_us": floor, "caches": caches}
        error_of = errors_at(shape, length)
        print(f"N = {length}: floor {floor:.1f} us", flush=True)
        times = {}
        for way in ways:
            try:
                row: dict = {
                    "layers": fixed(shape, way, length, caches, options),
                    "one cache": fixed(shape, way, length, 1, options),
                    "growing": growing(shape, way, length, options),
                    "error": error_of(way),
                }
            except (RuntimeError, ValueError) as error:  # the others are still worth having
                entry[way.name] = {"failed": f"{type(error).__name__}: {error}"}
                print(f"  {way.name:<8} {entry[way.name]['failed']}", flush=True)
                continue
            entry[way.name], times[way.name] = row, row["layers"]["us"]
            print(
                f"  {way.name:<8} {row['layers']['us']:9.1f} us (one cache "
                f"{row['one cache']['us']:.1f}, growing {row['growing']['us']:.1f}, "
                f"Python {row['layers']['python_us']:.1f}), error {row['error']:.1e}",
                flush=True,
            )
        others = [us for name, us in times.items() if name != ours.name]
        if ours.name in times and others:
            us, best = times[ours.name], min(others)
            entry["times_faster_than_the_better_of_mlx"] = best / us
            entry["times_the_floor"] = us / floor
            print(f"  {best / us:.2f} times faster than MLX, {us / floor:.2f} times the floor")
        entry["seconds"] = time.perf_counter() - start
        yield str(length), entry


def geometries(
    shape: Shape, backend: Backend, use: str, options: argparse.Namespace
) -> Iterator[tuple[str, dict]]:
    """The kernel in every geometry that fits, at every length: (geometry, microseconds)."""
    rows = shape.heads // shape.key_heads * shape.queries
    chosen = chosen_geometry(backend, shape.dtype, rows, shape.size)
    print(f"chosen: {chosen}", flush=True)
    for keys, simds, groups in product((16, 32, 64), (2, 4, 8), (66, 132, 264)):
        tried = attrs.evolve(chosen, keys=keys, simds=simds, groups=groups)
        sharing = simds * 16 // chosen.rows
        if not sharing or keys // 8 % sharing or simds * 16 % chosen.rows:
            continue
        if chosen.tensor and (keys % 32 or simds != chosen.simds):
            continue
        if tried.threadgroup_bytes(shape.size, shape.dtype.size) > backend.memory:
            continue
        launcher = None if use else Launcher(backend, tried)
        way = Way("kernel", kernel(shape, use, launcher), packed=not use)
        found: dict = {"chosen": tried == chosen}
        try:
            for length in options.keys:
                caches = max(1, min(ROTATED // shape.bytes_of(length), options.calls))
                found[str(length)] = fixed(shape, way, length, caches, options)["us"]
        except (RuntimeError, ValueError) as error:  # one that does not launch; the next may
            found["failed"] = f"{type(error).__name__}: {error}"
        print(tried, found, flush=True)
        yield str(tried), found


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, choices=SIZES)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--keys", type=int, nargs="+", default=[256, 1000, 1024, 4096, 16384])
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=12, help="evaluations of a growing cache")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 24 calls, 6 blocks")
    parser.add_argument("--implementation", help="in the kernel's place: array")
    parser.add_argument("--geometries", action="store_true", help="time the kernel's geometries")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.calls, options.blocks = 3, 24, 6
    if options.blocks < 3:
        parser.error("--blocks must be at least 3: the first two are a warm-up")
    mx.random.seed(7)
    module = next((m for m in (metal, cuda) if m.why_not_here() is None), None)
    if module is None and options.implementation is None:
        sys.exit("no GPU here: nothing to time (--implementation array rehearses)")
    shape = Shape(
        options.heads, options.key_heads, options.size, options.queries, options.rows,
        getattr(mx, options.dtype),
    )  # fmt: skip
    speed = copy_speed(2**30 if module else 2**24)
    launcher = None if module is None or options.implementation else module.LAUNCHER
    report = {
        "device": mx.device_info().get("device_name", platform.machine()),
        "implementation": options.implementation or module.BACKEND.name,
        "settings": {k: getattr(options, k) for k in ("calls", "rounds", "blocks")},
        "mlx": version_of("mlx"),
        "python": platform.python_version(),
        "shape": {**attrs.asdict(shape), "dtype": options.dtype},
        "copy_bytes_per_second": speed,
    }
    use = options.implementation or ""
    if options.geometries:
        key, found = "geometries", geometries(shape, (module or cuda).BACKEND, use, options)
    else:
        ours = Way(report["implementation"], kernel(shape, use, launcher), launcher is not None)
        key, found = "keys", compare(shape, ours, speed, options)
    report[key] = {}
    for name, entry in found:
        report[key][name] = entry
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
