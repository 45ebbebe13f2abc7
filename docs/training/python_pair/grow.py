"""Make a drafter deeper, and let it read more layers, without changing what it proposes.

    python grow.py DRAFT OUT --twice 2,5 --tap 7

A layer named in `--twice` is followed by a copy of itself whose two output projections are zero,
and the columns of `fc` for a new tap are zero too: OUT proposes exactly what DRAFT does, and
`draftloom train drafter --init OUT` goes on from there with more to learn in.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
Tensors = dict[str, mx.array]


def deeper(tensors: Tensors, layers: int, twice: list[int]) -> Tensors:
    """Layers [layers] and the copies, counted anew; everything else as it was."""
    grown = {name: value for name, value in tensors.items() if not name.startswith("layers.")}
    place = 0
    for layer in range(layers):
        own = f"layers.{layer}."
        rest = {n.removeprefix(own): v for n, v in tensors.items() if n.startswith(own)}
        grown |= {f"layers.{place}.{name}": value for name, value in rest.items()}
        place += 1
        if layer in twice:
            copy = rest | {name: mx.zeros_like(rest[name]) for name in OUTPUTS}
            grown |= {f"layers.{place}.{name}": value for name, value in copy.items()}
            place += 1
    return grown


def with_taps(tensors: Tensors, taps: list[int], more: list[int]) -> Tensors:
    """`fc` [hidden, taps x hidden] with zero columns where the new taps' features come in."""
    columns = dict(zip(taps, mx.split(tensors["fc.weight"], len(taps), axis=1), strict=True))
    empty = mx.zeros_like(next(iter(columns.values())))
    parts = [columns.get(tap, empty) for tap in sorted({*taps, *more})]
    return tensors | {"fc.weight": mx.concatenate(parts, axis=1)}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafter", type=Path, help="a z-lab checkpoint, not quantized")
    parser.add_argument("out", type=Path)
    parser.add_argument("--twice", type=numbers, default=[], help="layers that get a silent copy")
    parser.add_argument("--tap", type=numbers, default=[], help="further layers of the target")
    args = parser.parse_args()
    config = json.loads((args.drafter / "config.json").read_text("utf-8"))
    layers, taps = config["num_hidden_layers"], config["dflash_config"]["target_layer_ids"]
    tensors = mx.load(str(args.drafter / "model.safetensors"))
    tensors = with_taps(deeper(tensors, layers, args.twice), taps, args.tap)
    kinds = config["layer_types"]
    config["layer_types"] = [k for i, k in enumerate(kinds) for _ in range(1 + (i in args.twice))]
    config["num_hidden_layers"] = len(config["layer_types"])
    config["dflash_config"]["target_layer_ids"] = sorted({*taps, *args.tap})
    args.out.mkdir(parents=True)
    mx.save_safetensors(str(args.out / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    total = sum(value.size for value in tensors.values())
    print(f"{config['num_hidden_layers']} layers, {total:,} parameters")


if __name__ == "__main__":
    main()
