"""Train a tiny target on NVIDIA GPUs with PyTorch, and write it in mlx-lm's format.

    python target.py train --kind hybrid --data CORPUS --tokenizer DIR --minutes 9 --out RUN
    torchrun --nproc-per-node 4 target.py train ...      # the same, on four GPUs
    python target.py write --target RUN/target --prompts prompts.npz --out RUN/responses.safetensors

`--kind hybrid` is a Qwen3.5 (gated delta and full attention), `--kind attention` a Qwen3.
All of a run trains with weights rounded to 4 bits exactly as MLX stores them, so that the stored
model is the trained one. The last fifth also lowers the probability of tokens that
complete a repeated 8-gram in the model's own greedy text (unlikelihood, arXiv 1908.04319), as
long as that text repeats itself more than wanted. `--ahead N` also trains throw-away heads for
the N tokens after the next one.

RUN/target holds the 4-bit model, RUN/target-bf16 the same weights dequantized, RUN/log.jsonl what
happened. `write` lets the target go on from prompts (greedy, or sampled for a share), for
`draftloom train drafter --data`: arrays in .safetensors, or lines in .jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from decode import Decoder, repeats
from model import (
    BITS,
    EPS,
    GROUP,
    KINDS,
    THETA,
    VOCABULARY,
    Ahead,
    Target,
    codes_of,
    is_stored_in_4_bits,
    rounded,
)
from torch import nn

# ---------------------------------------------------------------- optimizer


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration of Muon, g [N, rows, columns]."""
    x = g.bfloat16() if g.is_cuda else g.float()
    flip = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(-1, -2) if flip else x).float()


class Muon:
    """Muon for the matrices of the layers, one batched product a shape; AdamW for the rest."""

    def __init__(self, model: Target, more: list[nn.Parameter]):
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        rest = list(more)
        for name, p in model.named_parameters():
            if name.startswith("layers.") and p.ndim == 2 and p.shape[0] >= 64:
                groups.setdefault(tuple(p.shape), []).append(p)
            else:
                rest.append(p)
        self.groups = [
            (ps, torch.zeros(len(ps), *shape, device=ps[0].device)) for shape, ps in groups.items()
        ]
        self.adam = torch.optim.AdamW(
            rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda
        )

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = 3e-3 * scale
        self.adam.step()
        for parameters, momentum in self.groups:
            g = torch.stack([p.grad for p in parameters])
            momentum.lerp_(g, 0.05)
            update = orthogonal(g.lerp(momentum, 0.95))
            rows, columns = update.shape[-2:]
            size = 0.02 * scale * max(1, rows / columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - 0.01 * scale * 0.1)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-size)


# ---------------------------------------------------------------- commands


class Corpus:
    """Random windows of the token files; files that arrive later are taken in."""

    def __init__(self, pattern: str, device: str):
        self.pattern, self.device, self.files = pattern, device, []
        self.tokens = torch.empty(0, dtype=torch.int16)
        self.look()

    def look(self) -> None:
        folder = Path(self.pattern)
        files = sorted(folder.glob("train*.bin"))
        if files != self.files:
            data = np.concatenate([np.fromfile(f, np.uint16) for f in files])
            self.tokens = torch.from_numpy(data.astype(np.int16)).to(self.device)
            self.files = files

    def windows(self, rows: int, width: int) -> torch.Tensor:
        start = torch.randint(len(self.tokens) - width, (rows, 1), device=self.device)
        return self.tokens[start + torch.arange(width, device=self.device)].long()


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def unlikelihood(hidden, head, target, bad) -> torch.Tensor:
    """Mean of -log(1 - p(token)) over tokens marked bad, [B, T]."""
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    p = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].exp()
    return -(torch.log1p(-p.clamp_max(1 - 1e-4)) * bad).sum() / bad.sum().clamp_min(1)


def rate(step: int, progress: float) -> float:
    """Share of the full learning rate: warm-up, constant, then down to a fiftieth."""
    return min(1.0, (step + 1) / 100) * min(1.0, max((1 - progress) / 0.55, 0.02))


class Tidier:
    """Makes the model's own greedy text repeat itself less."""

    def __init__(self, model: Target, corpus: Corpus, args: argparse.Namespace, device: str):
        self.model, self.corpus, self.args, self.device = model, corpus, args, device
        self.decoder = Decoder(model, args.pool, args.length + 1, device)
        self.calls, self.repeated = 0, 1.0

    @property
    def look_due(self) -> bool:
        return self.calls % 40 == 0

    def look(self) -> float:
        """Write a pool of texts; the mean share of repeated 8-grams in them."""
        args, prompt = self.args, self.args.length // 4
        self.pool = self.decoder.run(self.corpus.windows(args.pool, prompt), args.length + 1)
        bad = repeats(self.pool[:, prompt:])
        share = bad[:, 7:].float().mean(-1)
        before = torch.zeros_like(self.pool[:, :prompt], dtype=torch.bool)
        self.looping = torch.cat([before, bad], 1) & (share > 0.3)[:, None]
        self.repeated = share.mean().item()
        return self.repeated

    def loss(self, dtype: torch.dtype) -> torch.Tensor:
        """Of a batch of the shape that is compiled. Without any of it, plain training brings the
        loops back within a hundred steps."""
        self.calls += 1
        rows = torch.randint(self.args.pool, (self.args.rows,), device=self.device)
        ids, bad = self.pool[rows], self.looping[rows, 1:]
        hidden = self.model.hidden(ids[:, :-1], dtype)
        loss = unlikelihood(hidden, self.model.embed_tokens.effective(), ids[:, 1:], bad)
        return (0.25 if self.repeated > self.args.repeats else 0.08) * loss


class Team:
    """The processes that train together, one a GPU: as torchrun starts them, or one alone."""

    def __init__(self, device: str):
        self.rank, self.size = (
            int(os.environ.get("RANK", "0")),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Replace gradients by their mean over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
        )

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0)
        return shared.item()

    def leave(self) -> None:
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


class Log:
    """Lines of JSON, on the screen and in a file; nothing but from the first process."""

    def __init__(self, path: Path, rank: int):
        self.files = [sys.stdout, path.open("a")] if rank == 0 else []

    def __call__(self, **row: object) -> None:
        for out in self.files:
            print(json.dumps(row), file=out, flush=True)


def train(args: argparse.Namespace) -> None:  # noqa: C901, PLR0915 - one loop, read from top to bottom
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    team = Team(device)
    torch.manual_seed(args.seed)  # the same weights everywhere
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    args.out.mkdir(parents=True, exist_ok=True)
    say = Log(args.out / "log.jsonl", team.rank)

    corpus = Corpus(args.data, device)
    model = Target(args.kind, args.layers).to(device)
    ahead = Ahead(model.cfg["hidden"], args.ahead).to(device) if args.ahead else None
    if args.init:
        model.load_state_dict(torch.load(args.init, map_location=device))
    say(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=len(corpus.tokens), processes=team.size, ahead=args.ahead,
    )  # fmt: skip
    model.quantize(True)
    optimizer = Muon(model, list(ahead.parameters()) if ahead else [])
    parameters = [*model.parameters(), *(ahead.parameters() if ahead else ())]
    for layer in model.layers if device == "cuda" else ():
        layer.compile()
    loss_of = torch.compile(cross_entropy) if device == "cuda" else cross_entropy
    tidier: Tidier | None = None
    torch.manual_seed(args.seed + 1 + team.rank)  # other windows everywhere
    begin = warm = time.time()
    step = seen = 0
    running = None
    progress = args.begin
    while True:
        if step == args.warm_steps:  # the first steps compile: the schedule's clock starts here
            warm, seen = time.time(), 0
        if step > args.warm_steps and step % 5 == 0:
            passed = team.agree((time.time() - warm) / (args.minutes * 60))
            progress = args.begin + (1 - args.begin) * passed
        if progress >= 1 or (args.steps and step >= args.steps):
            break
        if step % 200 == 0:
            corpus.look()
        batch = corpus.windows(args.rows, args.length + 1 + args.ahead)
        hidden = model.hidden(batch[:, : args.length], dtype)
        head = model.embed_tokens.effective()
        loss = loss_of(hidden, head, batch[:, 1 : args.length + 1])
        if ahead:
            extra = loss_of(ahead(hidden), head, ahead.labels(hidden, batch))
            (loss + args.ahead_weight * extra).backward()
        else:
            loss.backward()
        if progress >= 0.78:
            tidier = tidier or Tidier(model, corpus, args, device)
            if tidier.look_due:
                say(step=step, repeated=round(tidier.look(), 4))
            tidier.loss(dtype).backward()
        team.average([p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(optimizer.adam.param_groups[0]["params"], 1.0)
        optimizer.step(rate(step, progress))
        for p in parameters:
            p.grad = None
        running = loss.detach() if running is None else running.lerp(loss.detach(), 0.02)
        step, seen = step + 1, seen + team.size * args.rows * args.length
        if step % args.every == 0 or step <= 3:
            say(
                step=step, loss=round(running.item(), 4), progress=round(progress, 3),
                seconds=round(time.time() - begin, 1), corpus=len(corpus.tokens),
                tokens_per_second=round(seen / max(time.time() - warm, 1e-9)),
                **({"ahead_loss": round(extra.item(), 4)} if ahead else {}),
            )  # fmt: skip
    model.quantize(True)
    if team.rank == 0:
        torch.save(model.state_dict(), args.out / "model.pt")
        export(model, args)
        took = round(time.time() - begin, 1)
        say(steps=step, tokens_seen=seen, seconds=took, written=str(args.out))
        if args.heldout:
            say(heldout_loss=heldout_loss(model, args, device, dtype))
    team.leave()


@torch.no_grad()
def heldout_loss(model: Target, args: argparse.Namespace, device: str, dtype: torch.dtype) -> float:
    data = torch.from_numpy(np.fromfile(args.heldout, np.uint16).astype(np.int64))
    rows = data[: len(data) // 513 * 513].view(-1, 513)[:512].to(device)
    total = 0.0
    for part in rows.split(32):
        logits = model(part[:, :-1], dtype).float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
    return total / len(rows)


def config_of(kind: str, cfg: dict) -> dict:
    text = {
        "hidden_size": cfg["hidden"], "intermediate_size": cfg["inter"],
        "num_hidden_layers": cfg["layers"], "num_attention_heads": cfg["heads"],
        "num_key_value_heads": cfg["kv"], "head_dim": cfg["head_dim"], "rms_norm_eps": EPS,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "max_position_embeddings": 4096,
        "eos_token_id": 0,
    }  # fmt: skip
    shared = {"eos_token_id": 0, "dtype": "bfloat16", "tie_word_embeddings": True}
    if kind == "attention":
        return {
            "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **text,
            "rope_theta": THETA, **shared,
        }  # fmt: skip
    text |= {
        "model_type": "qwen3_5_text", "linear_num_value_heads": cfg["value_heads"],
        "linear_num_key_heads": cfg["key_heads"], "linear_key_head_dim": cfg["dim"],
        "linear_value_head_dim": cfg["dim"], "linear_conv_kernel_dim": 4,
        "full_attention_interval": cfg["interval"],
        "rope_parameters": {
            "type": "default", "mrope_section": [11, 11, 10], "rope_theta": int(THETA),
            "partial_rotary_factor": cfg["rope_part"],
        },
    }  # fmt: skip
    return {
        "model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text, **shared,
    }  # fmt: skip


PREFIXES = {"hybrid": "language_model.model.", "attention": "model."}


def export(model: Target, args: argparse.Namespace) -> None:
    """Write RUN/target (4-bit) and RUN/target-bf16 (the same values)."""
    from safetensors.torch import save_file

    prefix = PREFIXES[args.kind]
    small: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, p in model.state_dict().items():
        p, name = p.detach().float().cpu(), prefix + name
        if is_stored_in_4_bits(name, p):
            codes, scale, bias = codes_of(p)
            flat = codes.flatten(-2).to(torch.int64).unflatten(-1, (-1, 8))
            packed = (flat << (4 * torch.arange(8))).sum(-1)
            small[name] = torch.from_numpy(packed.numpy().astype(np.uint32))
            base = name.removesuffix("weight")
            small[base + "scales"], small[base + "biases"] = scale.bfloat16(), bias.bfloat16()
            plain[name] = rounded(p).bfloat16()
        else:
            small[name] = plain[name] = p.bfloat16() if p.ndim >= 2 else p
    config = config_of(args.kind, model.cfg)
    for folder, tensors, extra in (
        ("target", small, {"quantization": {"group_size": GROUP, "bits": BITS, "mode": "affine"}}),
        ("target-bf16", plain, {}),
    ):
        out = args.out / folder
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "model.safetensors", metadata={"format": "mlx"})
        (out / "config.json").write_text(json.dumps(config | extra, indent=1) + "\n")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(args.tokenizer / name, out / name)


def stored(folder: Path) -> Target:
    """A 4-bit target as `export` wrote it, with the values it has: not to be rounded again, which
    would change some."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    kind = "hybrid" if "text_config" in config else "attention"
    layers = config.get("text_config", config)["num_hidden_layers"]
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in tensors:
        base = name.removesuffix("weight")
        if name != base:
            weights[name.removeprefix(PREFIXES[kind])] = unpacked(tensors, base)
        elif not name.endswith(("scales", "biases")):
            weights[name.removeprefix(PREFIXES[kind])] = tensors[name].float()
    model = Target(kind, layers)
    model.load_state_dict(weights)
    return model


def unpacked(tensors: dict[str, torch.Tensor], base: str) -> torch.Tensor:
    """The float32 values of a matrix that may be in 4 bits."""
    packed = tensors[base + "weight"]
    if base + "scales" not in tensors:
        return packed.float()
    words = packed.view(torch.int32).to(torch.int64)[..., None] >> (4 * torch.arange(8))
    codes = (words & 15).flatten(-2).unflatten(-1, (-1, GROUP)).float()
    product = (codes * tensors[base + "scales"].float()[..., None]).bfloat16().float()
    return (product + tensors[base + "biases"].float()[..., None]).bfloat16().float().flatten(-2)


@torch.no_grad()
def write(args: argparse.Namespace) -> None:
    """Let a trained target answer prompts from the corpus."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    model = stored(args.target).to(device)
    loaded = np.load(args.prompts)
    part, parts = map(int, args.part.split("/"))
    given = torch.from_numpy(loaded["lengths"])
    begins = given.cumsum(0) - given
    given, begins = given[part::parts], begins[part::parts]
    flat = torch.from_numpy(np.append(loaded["tokens"], [0] * given.max()).astype(np.int64))
    decoder = Decoder(model, args.batch, args.total, device)
    place = torch.arange(args.total, device=device)
    begin, written, kept = time.time(), 0, []
    for first in range(0, len(given) - args.batch + 1, args.batch):
        rows = slice(first, first + args.batch)
        starts = given[rows, None].long()
        prompts = flat[begins[rows, None] + torch.arange(starts.max())].to(device)
        starts = starts.to(device)
        hot = torch.rand(args.batch, 1, device=device) < args.sampled
        ids = decoder.run(prompts, args.total, hot * args.temperature, starts)
        ends = torch.where((ids == 0) & (place >= starts), place + 1, args.total).amin(1)
        whole = ends - starts[:, 0] >= 32
        kept.append([t[whole].cpu().numpy() for t in (ids, ends, starts[:, 0])])
        written += len(kept[-1][0])
        share = repeats(ids[:, prompts.shape[1] :])[:, 7:].float().mean().item()
        print(f"{written} written, {time.time() - begin:.1f} s, repeats {share:.3f}", flush=True)
    tokens, lengths, starts = (np.concatenate(t) for t in zip(*kept, strict=True))
    if args.out.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(
            {
                "tokens": tokens.astype(np.int32),
                "lengths": lengths.astype(np.int32),
                "prompts": starts.astype(np.int32),
            },
            args.out,
        )
        return
    with args.out.open("w") as out:
        for row, end, start in zip(*(t.tolist() for t in (tokens, lengths, starts)), strict=True):
            line = {"prompt_ids": row[:start], "response_ids": row[start:end]}
            out.write(json.dumps(line, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("train")
    p.set_defaults(call=train)
    p.add_argument("--kind", choices=KINDS, required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--heldout", type=Path)
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--layers", type=int, help="other than the kind's")
    p.add_argument("--ahead", type=int, default=0, help="tokens after the next one")
    p.add_argument("--ahead-weight", type=float, default=0.3)
    p.add_argument("--minutes", type=float, default=9.0)
    p.add_argument("--init", type=Path, help="go on from this model.pt")
    p.add_argument("--begin", type=float, default=0.0, help="share of the schedule already done")
    p.add_argument("--steps", type=int, default=0)
    p.add_argument("--rows", type=int, default=64)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--pool", type=int, default=1024)
    p.add_argument("--repeats", type=float, default=0.3)
    p.add_argument("--warm-steps", type=int, default=5)
    p.add_argument("--every", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    p = commands.add_parser("write")
    p.set_defaults(call=write)
    p.add_argument("--target", type=Path, required=True, help="RUN/target")
    p.add_argument("--prompts", type=Path, required=True, help="of prompts.py")
    p.add_argument("--part", default="0/1", help="I/N: every Nth prompt from the Ith on")
    p.add_argument("--batch", type=int, default=2048)
    p.add_argument("--total", type=int, default=448, help="tokens of prompt and response")
    p.add_argument("--sampled", type=float, default=0.05)
    p.add_argument("--temperature", type=float, default=0.8)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
