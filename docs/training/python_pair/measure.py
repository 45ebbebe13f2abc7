"""Measure a pair on held-out Python prompts, with the real decoder.

    python measure.py PAIR_OR_TARGET [--drafter DIR] [--part 0/2] > result.jsonl
    python measure.py --loss TARGET --heldout heldout.bin
    python measure.py --summary result.jsonl ...

One line a prompt: cycles, committed tokens, share of repeated 8-grams, whether the function body
parses. tau is committed tokens over cycles, of all prompts together. A body is what stands deeper
than its `def`; where 256 tokens end it, its last line, which may be half a line, is left out.
Weights are computed in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import textwrap
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def repeated(ids: tuple[int, ...], n: int = 8) -> float:
    """Share of n-grams that stood in the text before."""
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / max(1, len(grams))


def parses(prompt: str, completion: str) -> bool:
    """Whether the function begun by the prompt's last line is Python."""
    head, *lines = (prompt.rsplit("\n", 1)[-1] + completion).split("\n")
    depth = len(head) - len(head.lstrip())
    body, ended = [], False
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= depth:
            ended = True
            break
        body.append(line)
    if not ended:
        body = body[:-1]
    try:
        ast.parse(textwrap.dedent("\n".join([head, *body])))
    except (SyntaxError, ValueError):
        return False
    return any(line.strip() for line in body)


def decode(args: argparse.Namespace) -> None:
    import draftloom

    builder = draftloom.PipelineBuilder(args.target).dtype("float32").own_width()
    if args.drafter:
        builder = builder.drafter("dflash", checkpoint=args.drafter)
    pipeline = builder.build()
    part, parts = map(int, args.part.split("/"))
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()]
    for number in range(part, len(prompts), parts):
        result = pipeline.generate(prompts[number], max_tokens=args.tokens)
        stats = result.stats
        row = {
            "prompt": number,
            "tokens": len(result.token_ids),
            "cycles": stats.cycles,
            "committed": stats.committed,
            "by_position": stats.accepted_by_position,
            "repeated": round(repeated(result.token_ids), 4),
            "parses": parses(prompts[number], result.text),
            "text": result.text,
        }
        print(json.dumps(row), flush=True)


def summary(files: list[Path]) -> dict[str, float | int]:
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]

    def tau(some: list[dict]) -> float:
        return round(sum(r["committed"] for r in some) / max(1, sum(r["cycles"] for r in some)), 3)

    calm = [r for r in rows if r["repeated"] < 0.3]
    return {
        "prompts": len(rows),
        "tokens": sum(r["tokens"] for r in rows),
        "tau": tau(rows),
        "tau_not_looping": tau(calm),
        "not_looping": len(calm),
        "repeated": round(sum(r["repeated"] for r in rows) / len(rows), 3),
        "parses": sum(r["parses"] for r in rows),
    }


def loss(target: Path, heldout: Path, rows: int) -> float:
    """Mean nats a token over rows of 512 tokens."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx_lm
    import numpy as np
    from mlx_lm.utils import dequantize_model

    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load(str(target))
    if "quantization" in json.loads((target / "config.json").read_text("utf-8")):
        model = dequantize_model(model)
    model.set_dtype(mx.float32)
    data = np.fromfile(heldout, np.uint16).astype(np.int32)
    data = data[: len(data) // 513 * 513].reshape(-1, 513)
    chosen = np.random.RandomState(0).permutation(len(data))[:rows]
    losses = []
    for i in chosen:
        row = mx.array(data[i][None])
        losses.append(nn.losses.cross_entropy(model(row[:, :-1]), row[:, 1:]).mean().item())
        print(f"{len(losses)} {sum(losses) / len(losses):.4f}", file=sys.stderr, flush=True)
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?")
    parser.add_argument("--drafter")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--loss", type=Path)
    parser.add_argument("--heldout", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--summary", type=Path, nargs="+")
    args = parser.parse_args()
    if args.summary:
        print(json.dumps(summary(args.summary), indent=1))
    elif args.loss:
        print(json.dumps({"loss": round(loss(args.loss, args.heldout, args.rows), 4)}))
    else:
        decode(args)


if __name__ == "__main__":
    main()
