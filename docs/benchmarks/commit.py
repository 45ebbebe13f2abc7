"""What a commit costs the host: 24 gated-delta layers of a tiny size, a block of 16, 8 kept.

    python docs/benchmarks/commit.py OUT.json

Every layer's work on the device is small on purpose, so that what is timed is Python, MLX's graph,
and the calls that start it. "commit" is wall time inside `Speculation.commit`, "cycle" that of
begin, verify, one blocking read and commit; medians over cycles (and the least), in milliseconds.
"again" is the same commit once more, which frees nothing: Python, MLX's graph and the calls alone.

On the CPU the replay is hundreds of small operations, which hide the rest. So it is timed once more
with one addition a layer in its place, as one launch would be on a GPU; that line is named so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from mlx_lm.models import qwen3_5

from draftloom.adapters.qwen3_5 import HybridAdapter
from draftloom.caches.tape_replay import TapeReplayRollback
from draftloom.caches.trim import TrimRollback
from draftloom.composite import CompositeRollback
from draftloom.contracts import CacheKind
from draftloom.kernels import gated_delta
from draftloom.model_info import ModelInfo

CONFIG = {
    "model_type": "qwen3_5",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 32,
    "full_attention_interval": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
WIDTH, KEPT = 15, 7


def target() -> HybridAdapter:
    """A random model: 24 gated-delta layers, 8 attention layers."""
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(dict(CONFIG)))
    mx.eval(model.parameters())
    info = ModelInfo.from_model(model)
    return HybridAdapter(model, HybridAdapter.describe(info))


def one_operation(state: mx.array, *_: Any, **__: Any) -> mx.array:
    """Stands in for a replay of one launch."""
    return state + 0.0


def measure(make: Callable[[], Any], cycles: int) -> dict[str, float]:
    """Median milliseconds of a commit and of a cycle, after a warm-up."""
    adapter = target()
    rollbacks = {CacheKind.GATED_DELTA: make(), CacheKind.ATTENTION: TrimRollback()}
    rollback = CompositeRollback(rollbacks, adapter)
    cache = adapter.make_cache()
    block = mx.array([list(range(WIDTH + 1))], dtype=mx.int32)
    commits, wholes, again = [], [], []
    for _ in range(cycles + 5):
        start = time.perf_counter()
        speculation = rollback.begin(cache, block)
        mx.eval(adapter.forward(block, speculation.cache).logits)
        read = time.perf_counter()
        speculation.commit((KEPT,))
        end = time.perf_counter()
        commits.append(end - read)
        wholes.append(end - start)
        speculation.commit((KEPT,))
        again.append(time.perf_counter() - end)
    mx.eval([entry.state for entry in cache])
    adapter.close()
    return {
        "commit_ms": statistics.median(commits[5:]) * 1e3,
        "commit_least_ms": min(commits[5:]) * 1e3,
        "again_least_ms": min(again) * 1e3,
        "cycle_ms": statistics.median(wholes[5:]) * 1e3,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--cycles", type=int, default=60)
    options = parser.parse_args()
    deferring = partial(TapeReplayRollback, defer=True)
    times = {"array replay": measure(TapeReplayRollback, options.cycles)}
    with mock.patch.object(gated_delta, "replay", one_operation):
        name = "one operation in place of the replay"
        times[name] = measure(TapeReplayRollback, options.cycles)
        times[f"{name}, deferred"] = measure(deferring, options.cycles)
    report = {
        "device": str(mx.default_device()),
        "machine": platform.machine(),
        "mlx": mx.__version__,
        "layers": 24,
        "kept": KEPT + 1,
        "of": WIDTH + 1,
        "times": times,
    }
    print(json.dumps(report["times"], indent=1))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
