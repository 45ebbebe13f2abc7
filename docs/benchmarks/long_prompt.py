"""Peak memory of a long prompt, with and without streaming of features:

    python docs/benchmarks/long_prompt.py OUT.json [--tokens 32768]

A random hybrid (three gated-delta layers, one of attention) and a random DFlash drafter that
reads all four of its layers. The bundled target was made for 4,096 positions; this one is smaller,
so that a CPU gets through the prompt in minutes. "streamed" is what draftloom does: every chunk's
features become rows of the drafter's context before the next chunk runs. "kept" is the same
drafter, shown the features of the whole prompt at once when its first draft is wanted. Each run is
a process of its own; `peak` is MLX's, from before the weights are loaded to the end.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5

import draftloom
from draftloom.drafters.dflash import DFlashDrafter
from draftloom.versions import version_of

HIDDEN, VOCAB, TAPS = 192, 256, (0, 1, 2, 3)
TARGET = {
    "model_type": "qwen3_5", "hidden_size": HIDDEN, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32,
    "vocab_size": VOCAB, "rms_norm_eps": 1e-6, "max_position_embeddings": 65536,
    "tie_word_embeddings": True, "full_attention_interval": 4, "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}  # fmt: skip
DRAFTER = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": HIDDEN,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536, "rope_theta": 1e6, "block_size": 8,
    "dflash_config": {"mask_token_id": VOCAB - 1, "target_layer_ids": list(TAPS)},
}  # fmt: skip


class _Kept:
    """A session that is shown everything at once."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._tokens: list[int] = []
        self._features: list[mx.array] = []

    def observe(self, committed: Any, features: mx.array | None) -> None:
        assert features is not None
        self._tokens += committed[0]
        self._features.append(features)
        mx.eval(features)

    def propose(self, anchor: mx.array, width: int, sampling: Any) -> draftloom.Draft:
        if self._tokens:
            whole = mx.concatenate(self._features, axis=1)
            self._features.clear()
            self._session.observe((tuple(self._tokens),), whole)
            self._tokens.clear()
        return self._session.propose(anchor, width, sampling)  # type: ignore[no-any-return]


class KeepingDrafter(DFlashDrafter):
    """DFlash without streaming."""

    info = attrs.evolve(DFlashDrafter.info, name="bench.kept")

    def open(self, request: draftloom.DraftRequest) -> Any:
        return _Kept(super().open(request))


class Plugin:
    @draftloom.hookimpl
    def register_drafters(self, register: draftloom.Register) -> None:
        register("bench.kept", KeepingDrafter)


def write(folder: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def make(folder: Path) -> None:
    """Write both models."""
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> mx.array:
        noise = rng.standard_normal(shape)
        value = 1 + 0.1 * noise if len(shape) == 1 else noise / np.sqrt(shape[-1])
        return mx.array(value.astype(np.float32))

    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(json.loads(json.dumps(TARGET))))
    names: Any = tree_flatten(model.parameters())
    write(folder / "target", TARGET, {n: random(v.shape) for n, v in names})
    kv, q = 2 * 32, 4 * 32
    shapes = {"fc.weight": (HIDDEN, len(TAPS) * HIDDEN), "hidden_norm.weight": (HIDDEN,)}
    shapes["norm.weight"] = (HIDDEN,)
    for i in range(2):
        shapes |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, q),
                "self_attn.q_norm": (32,), "self_attn.k_norm": (32,),
                "mlp.gate_proj": (256, HIDDEN), "mlp.up_proj": (256, HIDDEN),
                "mlp.down_proj": (HIDDEN, 256),
            }.items()
        }  # fmt: skip
    write(folder / "drafter", DRAFTER, {n: random(s) for n, s in shapes.items()})


def run(folder: Path, drafter: str, tokens: int, step: int) -> dict[str, Any]:
    """One prompt and a few tokens, in this process."""
    mx.set_default_device(mx.cpu)
    plugins = draftloom.PluginManager(entry_points=False, extra=[Plugin()])
    builder = (
        draftloom.PipelineBuilder(folder / "target", plugins=plugins)
        .own_width()
        .dtype("float32")
        .drafter(drafter, checkpoint=str(folder / "drafter"))
        .memory(context_length=tokens + 16, prefill_step_size=step)
    )
    estimate = builder.memory_estimate()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    with builder.build() as pipeline:
        prompt = [int(t) for t in np.random.default_rng(1).integers(VOCAB - 1, size=tokens)]
        result = pipeline.generate(prompt, max_tokens=8)
    held = result.stats.memory
    assert held is not None
    assert not result.stats.fell_back, result.stats.fell_back
    return {
        "features": "streamed" if drafter == "dflash" else "kept",
        "prefill_step_size": step,
        "peak": held.peak,
        "estimate": estimate.total,
        "seconds": round(time.perf_counter() - begin, 1),
        "held": held.as_dict(),
        "token_ids": list(result.token_ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--one", nargs=3, metavar=("DRAFTER", "STEP", "FOLDER"))
    given = parser.parse_args()
    if given.one:
        drafter, step, folder = given.one
        found = run(Path(folder), drafter, given.tokens, int(step))
        given.out.write_text(json.dumps(found))
        return
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for drafter, step in (("dflash", 128), ("bench.kept", 128)):
            one = folder / "one.json"
            command = [sys.executable, __file__, str(one), "--tokens", str(given.tokens)]
            subprocess.run([*command, "--one", drafter, str(step), name], check=True)
            runs.append(json.loads(one.read_text()))
            print(runs[-1]["features"], step, f"peak {runs[-1]['peak'] / 1e6:.1f} MB", flush=True)
    assert len({tuple(r["token_ids"]) for r in runs}) == 1, "the texts differ"
    report = {
        "unit": "bytes",
        "tokens": given.tokens,
        "features_of_the_prompt": (given.tokens - 1) * len(TAPS) * HIDDEN * 4,
        "machine": {
            "platform": platform.platform(),
            "processor": mx.device_info().get("device_name", platform.processor()),
            "device": "cpu",
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("mlx", "mlx-lm", "draftloom")},
        },
        "target": TARGET,
        "drafter": DRAFTER,
        "runs": runs,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
