"""`python -m draftloom.apps.demo`: the bundled pair writes, and a table says how it went.

Every number is measured in this run. The target alone is plain mlx-lm on the same weights, after
the pipeline has been closed. Speeds are those of the median step, so that a stall of a busy
machine does not decide.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence

import attrs
import mlx.core as mx
from mlx_lm.generate import generate_step
from rich.console import Console
from rich.table import Table

import draftloom
from draftloom.apps.audit import first_difference, judge, run_reference
from draftloom.apps.cli.output import TextPrinter, busy, fallback_on_stderr, say_error
from draftloom.apps.prompts import DEMO_PROMPT
from draftloom.versions import version_of

__all__ = ["DemoReport", "main", "measure", "render"]

CPU_BLOCK = 8
"""On a CPU a verified token costs about as much as a plain one, so that blocks are kept short."""
BAR = 30


@attrs.frozen
class DemoReport:
    """What the demo measured.

    Attributes:
        result: the pipeline's text, tokens and counts.
        tokens_per_second: speculative: tokens a cycle over the median seconds of a cycle.
        plain_tokens_per_second: the target alone, through mlx-lm: one over its median step.
        comparison: whether the tokens are the target's own, in words.
        verdict: ``identical``, ``tie`` or ``bug``.
        device: where it ran.
        dtype: what the target computed logits in.
    """

    result: draftloom.GenerationResult
    tokens_per_second: float
    plain_tokens_per_second: float
    comparison: str
    verdict: str
    device: str
    dtype: str


def measure(printer: TextPrinter, max_tokens: int, block_size: int | None = None) -> DemoReport:
    """Generate with the bundled pair, streaming, and then with its target alone.

    Args:
        printer: where the text goes.
        max_tokens: tokens to generate.
        block_size: tokens a cycle verifies; by default the drafter's, `CPU_BLOCK` on a CPU.

    Raises:
        DraftloomError: the pair cannot be loaded, or the target failed.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    size = block_size or (CPU_BLOCK if on_cpu else None)
    builder = draftloom.PipelineBuilder().own_width()
    if size is not None:
        builder = builder.block_size(size)
    with busy("loading the bundled pair"):
        pipeline = builder.build()
    with pipeline:
        prompt = pipeline.encode(DEMO_PROMPT)
        pipeline.generate(prompt, max_tokens=2)  # compiles kernels, where there are any
        chunks = []
        stream = pipeline.stream(prompt, max_tokens=max_tokens, ignore_eos=True)
        for chunk in stream:
            chunks.append(chunk)
            printer.write(chunk.text)
        printer.end()
        result = stream.result(chunks)
        model = pipeline.model
    # Closed: the model is as mlx-lm loaded it.
    with busy("the target alone"):
        tokens, speed, dtype = _alone(model, prompt, max_tokens)
    verdict, comparison = _compare(model, prompt, result.token_ids, tokens)
    cycles = [chunk.cycle for chunk in chunks if chunk.cycle.index]
    committed = sum(len(cycle.token_ids) for cycle in cycles)
    ours = _per_second([cycle.seconds for cycle in cycles]) * committed / max(len(cycles), 1)
    return DemoReport(result, ours, speed, comparison, verdict, _device_name(), dtype)


def _alone(model: object, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], float, str]:
    """Tokens of plain mlx-lm, its tokens a second, and the type of its logits."""
    times, tokens, dtype = [], [], ""
    for token, logprobs in generate_step(mx.array(list(prompt)), model, max_tokens=max_tokens):
        tokens.append(int(token))
        times.append(time.perf_counter())
        dtype = str(logprobs.dtype).removeprefix("mlx.core.")
    return tokens, _per_second([b - a for a, b in itertools.pairwise(times)]), dtype


def _per_second(seconds: Sequence[float]) -> float:
    """One over the median; 0 of nothing."""
    return 1 / statistics.median(seconds) if seconds else 0.0


def _compare(
    model: object, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> tuple[str, str]:
    position = first_difference(ours, theirs)
    if position is None:
        return "identical", f"yes: all {len(ours)} tokens equal the target's own"
    reference = run_reference(model, prompt, ours, frozenset(), len(theirs))
    found = judge(position, ours[position], theirs[position], reference.logits)
    return (
        found.verdict,
        f"no: different from token {position} on: {found.verdict} (margin {found.margin})",
    )


def _device_name() -> str:
    details = mx.device_info()
    name = str(details.get("device_name") or details.get("architecture") or "?")
    return f"{name} ({mx.default_device().type.name})"


def render(report: DemoReport, console: Console) -> Table:
    """The table: tokens, cycles, acceptance with bars, speed, equality."""
    stats, names = report.result.stats, report.result.pipeline
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold" if console.is_terminal else "")
    table.add_column()
    table.add_row("pipeline", f"{names['target']}, {names['drafter']}, {names['rollback']}")
    table.add_row("tokens", f"{stats.generated_tokens} ({stats.prompt_tokens} of prompt)")
    table.add_row("cycles", f"{stats.cycles} of {names['width'].rpartition(' ')[2]} draft tokens")
    table.add_row("acceptance length", f"{stats.acceptance_length:.2f} tokens a cycle")
    filled, empty = ("█", "░") if console.encoding.lower().startswith("utf") else ("#", ".")
    for index, rate in enumerate(stats.rate_by_position, start=1):
        bar = filled * round(rate * BAR)
        bar += empty * (BAR - len(bar))
        table.add_row(
            "acceptance by position" if index == 1 else "", f"{index:>2} {bar} {rate:4.0%}"
        )
    ours, alone = report.tokens_per_second, report.plain_tokens_per_second
    table.add_row("speculative", f"{ours:.1f} tokens/s")
    table.add_row("target alone", f"{alone:.1f} tokens/s, plain mlx-lm in this same run")
    table.add_row("", _verdict_on_speed(report))
    table.add_row("lossless", report.comparison)
    table.add_row("device", f"{report.device}, {report.dtype}")
    table.add_row("versions", _versions())
    return table


def _verdict_on_speed(report: DemoReport) -> str:
    stats, alone = report.result.stats, report.plain_tokens_per_second
    ours = report.tokens_per_second
    if not stats.cycles or not ours or not alone:
        return "too few tokens to say"
    if stats.fell_back:
        return f"the drafter was given up: {stats.fell_back}"
    if ours >= alone:
        return f"{ours / alone:.2f} times as fast"
    gain, place = stats.acceptance_length, "CPU" if report.device.endswith("(cpu)") else "device"
    return f"slower: a cycle gives {gain:.1f}, costs {gain * alone / ours:.1f} on this {place}"


def _versions() -> str:
    return ", ".join(f"{name} {version_of(name)}" for name in ("draftloom", "mlx", "mlx-lm"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 1 if the tokens are not the target's own; 2 if the pair cannot be run.
    """
    parser = argparse.ArgumentParser(prog="python -m draftloom.apps.demo", description=__doc__)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--block-size", type=int, help="tokens a cycle verifies")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    console.print(DEMO_PROMPT, end="", style="dim", markup=False, soft_wrap=True)
    try:
        with fallback_on_stderr():
            report = measure(TextPrinter(), given.max_tokens, given.block_size)
    except draftloom.DraftloomError as error:
        say_error(str(error))
        return 2
    with console.capture() as table:
        console.print(render(report, console))
    sys.stdout.write("\n" + "\n".join(line.rstrip() for line in table.get().splitlines()) + "\n")
    return 1 if report.verdict == "bug" else 0


if __name__ == "__main__":
    sys.exit(main())
