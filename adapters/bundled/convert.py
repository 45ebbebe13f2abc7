"""Make a bundled pair from a trained one: MLX weights in 6 or 8 bits, tokenizer, configs.

Run once per pair, from the repository root::

    python -m draftloom.adapters.bundled.convert SOURCE adapters/bundled/NAME \\
        --description "what the pair is, in one line"

SOURCE holds `target/` (mlx-lm format) and `draft/` (z-lab DFlash format). Only
matrices are quantized; everything else keeps its dtype. A part that is quantized already (a
target trained with rounded weights) is copied as it is. Both results carry the
`quantization` key in their `config.json`, so that `mlx_lm.load(target)` works as is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import frozen

from draftloom.errors import ModelError

__all__ = ["PartReport", "QuantSpec", "convert_pair", "convert_part", "main", "quantize_matrix"]

MIN_ROWS = 64
"""Matrices with fewer rows stay as they are: little to win, and decay gates are sensitive."""

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@frozen
class QuantSpec:
    """How matrices are stored.

    Attributes:
        bits: Bits a weight, 2 to 8.
        group_size: Weights along the input axis that share a scale and a bias.
    """

    bits: int = 8
    group_size: int = 64

    def config(self) -> dict[str, Any]:
        """The `quantization` entry mlx-lm reads from `config.json`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


@frozen
class PartReport:
    """What became of one half of a pair.

    Attributes:
        path: The folder written.
        parameters: Parameters of the source, counted before quantization.
        quantized: Matrices stored as (weight, scales, biases).
        kept: Tensors stored as they were.
        num_bytes: Size of all files in the folder, in bytes.
    """

    path: Path
    parameters: int
    quantized: int
    kept: int
    num_bytes: int


def quantize_matrix(weight: mx.array, spec: QuantSpec) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize one matrix so that stored scales and codes agree.

    `mx.quantize` picks scales in float32; stored as bfloat16 they would no longer be
    the ones its codes were made for. So scales and biases are rounded first and the
    codes are made anew for the rounded ones: smaller error, same format and size.

    Args:
        weight: [rows, columns] floating; columns a multiple of `spec.group_size`.
        spec: Bits and group size.

    Returns:
        weight [rows, columns * bits / 32] uint32 (a row's codes one after the other, lowest bit
        first), scales and biases [rows, columns / group_size] bfloat16.

    Raises:
        ModelError: the columns do not divide into groups.
    """
    rows, columns = weight.shape
    if columns % spec.group_size:
        raise ModelError(f"{columns} columns do not divide into groups of {spec.group_size}")
    exact = weight.astype(mx.float32)
    _, scales, biases = mx.quantize(exact, group_size=spec.group_size, bits=spec.bits)
    scales, biases = scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)
    step = scales.astype(mx.float32)[..., None]
    offset = biases.astype(mx.float32)[..., None]
    groups = exact.reshape(rows, -1, spec.group_size)
    codes = mx.round((groups - offset) / mx.where(step == 0, 1.0, step))
    codes = mx.clip(codes, 0, 2**spec.bits - 1).astype(mx.uint8).reshape(rows, columns)
    return _packed(codes, spec.bits).view(mx.uint32), scales, biases


def convert_part(source: Path, destination: Path, spec: QuantSpec) -> PartReport:
    """Quantize one checkpoint folder into another.

    Args:
        source: Folder with `config.json` and one or more `*.safetensors`.
        destination: Folder to write; created, existing files of the same name replaced.
        spec: Bits and group size.

    Raises:
        ModelError: `config.json` or the weights are missing, the source is quantized in another
            way than MLX's, or a tensor is not finite.
    """
    if not (source / "config.json").is_file():
        raise ModelError(f"no config.json in {source}")
    config = json.loads((source / "config.json").read_text("utf-8"))
    packed = config.get("quantization")
    if not packed and "quantization_config" in config:
        raise ModelError(f"{source} is quantized already, and not by MLX", "convert the original")
    tensors = _read_weights(source)
    stored: dict[str, mx.array] = {}
    quantized = 0
    for name, value in sorted(tensors.items()):
        floating = mx.issubdtype(value.dtype, mx.floating)
        if floating and not mx.isfinite(value).all().item():
            raise ModelError(f"{source}: {name} holds values that are not finite")
        if packed:
            stored[name] = value
            quantized += name.endswith(".scales")
        elif floating and _is_matrix(name, value, spec):
            base = name.removesuffix(".weight")
            parts = quantize_matrix(value, spec)
            stored |= zip((name, f"{base}.scales", f"{base}.biases"), parts, strict=True)
            quantized += 1
        else:
            stored[name] = value
    destination.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(destination / WEIGHTS), stored, metadata={"format": "mlx"})
    config["quantization"] = packed or spec.config()
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, destination / file)
    return PartReport(
        path=destination,
        parameters=_count(tensors, packed),
        quantized=quantized,
        kept=len(tensors) - (3 * quantized if packed else quantized),
        num_bytes=sum(f.stat().st_size for f in destination.iterdir() if f.is_file()),
    )


def convert_pair(
    source: Path, destination: Path, description: str, spec: QuantSpec | None = None
) -> tuple[PartReport, PartReport]:
    """Quantize `source/{target,draft}` into `destination` and describe it in `pair.toml`.

    Args:
        source: Folder with `target/` and `draft/`.
        destination: `adapters/bundled/NAME`; its last part is the pair's name.
        description: One line for listings.
        spec: Bits and group size; 8 and 64 by default.

    Returns:
        The reports of target and draft.

    Raises:
        ModelError: See `convert_part`.
    """
    spec = spec or QuantSpec()
    reports = (
        convert_part(source / "target", destination / "target", spec),
        convert_part(source / "draft", destination / "draft", spec),
    )
    line = f"description = {json.dumps(description, ensure_ascii=False)}\n"
    (destination / "pair.toml").write_text(line, "utf-8")
    return reports


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes [rows, columns] uint8 as a stream of `bits` each, [rows, columns * bits / 8] uint8."""
    stream = (codes[..., None] >> mx.arange(bits, dtype=mx.uint8)) & 1
    places = mx.arange(8, dtype=mx.uint8)
    octets = stream.reshape(codes.shape[0], -1, 8) << places
    return octets.sum(axis=-1).astype(mx.uint8)


def _count(tensors: Mapping[str, mx.array], packed: Mapping[str, Any] | None) -> int:
    """Weights of the model, packed ones counted singly, scales and biases not at all."""
    if not packed:
        return sum(value.size for value in tensors.values())
    return sum(
        value.size * 32 // packed["bits"] if value.dtype == mx.uint32 else value.size
        for name, value in tensors.items()
        if not name.endswith((".scales", ".biases"))
    )


def _read_weights(source: Path) -> Mapping[str, mx.array]:
    """All tensors of a folder's safetensors files, shards merged."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no *.safetensors in {source}")
    tensors: dict[str, mx.array] = {}
    for file in files:
        loaded = mx.load(str(file))
        if not isinstance(loaded, dict):
            raise ModelError(f"{file} is not a safetensors file of named tensors")
        tensors |= loaded
    return tensors


def _is_matrix(name: str, value: mx.array, spec: QuantSpec) -> bool:
    """Whether a tensor is a Linear or Embedding weight worth quantizing."""
    return (
        name.endswith(".weight")
        and value.ndim == 2
        and value.shape[0] >= MIN_ROWS
        and value.shape[1] % spec.group_size == 0
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a pair and print the sizes. Returns 0, or 2 where the source is no good."""
    parser = argparse.ArgumentParser(description="Quantize a target and its drafter for bundling.")
    parser.add_argument("source", type=Path, help="folder with target/ and draft/")
    parser.add_argument("destination", type=Path, help="folder to write, named after the pair")
    parser.add_argument("--description", required=True, help="one line for listings")
    parser.add_argument("--bits", type=int, default=8, choices=(4, 6, 8), help="of a weight")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    args = parser.parse_args(argv)
    spec = QuantSpec(args.bits, args.group_size)
    try:
        reports = convert_pair(args.source, args.destination, args.description, spec)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for report in reports:
        print(
            f"{report.path.name}: {report.parameters:,} parameters, {report.quantized} matrices "
            f"quantized, {report.kept} tensors kept, {report.num_bytes:,} bytes"
        )
    print(f"total: {sum(report.num_bytes for report in reports):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
