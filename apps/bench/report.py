"""A benchmark as plain data: settings, machine, every raw run, and the summary drawn from them.

The JSON file is this data; tables, plots and comparisons are made from it and from nothing else.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import mlx.core as mx

from draftloom.device import device_memory
from draftloom.errors import UsageError
from draftloom.versions import version_of

from .measure import Run, Settings, Text, measure
from .prompts import EncodedPrompt
from .stages import StageTimes, all_repeats
from .subjects import Subject

__all__ = [
    "FORMAT",
    "Report",
    "Spread",
    "head",
    "machine",
    "read_report",
    "run_bench",
    "speeds",
    "spread",
    "summarize",
]

FORMAT = 1
Report = dict[str, Any]
"""JSON data."""


@attrs.frozen
class Spread:
    """Several measurements of one thing.

    Attributes:
        median, low, high: of them; the lowest and the highest.
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and range of at least one value."""
    return Spread(median(values), min(values), max(values))


MLX_SETTINGS = (
    "MLX_CUDA_GRAPH_CACHE_SIZE", "MLX_ENABLE_TF32", "MLX_MAX_MB_PER_BUFFER",
    "MLX_MAX_OPS_PER_BUFFER", "MLX_USE_CUDA_GRAPHS",
)  # fmt: skip
"""What MLX reads from the environment alone and works by."""


def machine() -> dict[str, Any]:
    """What it ran on, without anything that names a person or a host."""
    details = mx.device_info()
    name = details.get("device_name") or details.get("architecture") or "?"
    return {
        "device": str(name),
        "backend": mx.default_device().type.name,
        "memory_bytes": device_memory() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "mlx_settings": {name: os.environ[name] for name in MLX_SETTINGS if name in os.environ},
    }


def run_bench(
    subject: Subject,
    settings: Settings,
    prompts: Sequence[EncodedPrompt],
    *,
    stages: bool = True,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Measure everything.

    Args:
        subject: what to run.
        settings: how.
        prompts: at least one.
        stages: make the instrumented pass too.
        progress: told what runs next.

    Returns:
        The report: JSON data.
    """
    found = measure(subject, settings, prompts, progress, stages=stages)
    return _report(subject, settings, found.runs, found.texts, all_repeats(found.stages))


def head(subject: Subject, settings: Settings) -> Report:
    """What every report begins with: what ran, on what, and how."""
    simulation = subject.simulation
    return {
        "format": FORMAT,
        "simulated": None if simulation is None else attrs.asdict(simulation),
        "target": subject.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version_of(name) for name in ("draftloom", "mlx", "mlx-lm")},
        "settings": attrs.asdict(settings),
    }


def _report(
    subject: Subject,
    settings: Settings,
    runs: Sequence[Run],
    texts: Sequence[Text],
    times: Sequence[StageTimes],
) -> Report:
    report: Report = {
        **head(subject, settings),
        "variants": [{"name": v.name, "parts": v.parts} for v in subject.variants],
        "runs": [attrs.asdict(run) for run in runs],
        "stages": [attrs.asdict(entry) for entry in times],
        "texts": [attrs.asdict(text) for text in texts],
    }
    report = json.loads(json.dumps(report))  # what a reader of the file gets
    report["summary"] = summarize(report)
    return report


def summarize(report: Report) -> list[Report]:
    """One entry a variant and length, over all suites (``suite`` is "all") and, where there are
    several, a suite.

    A repeat's speed is its decoded tokens over its decode seconds; medians and ranges are those
    of the repeats. A ratio compares a repeat with the same repeat of the target alone, an
    efficiency with the pass that timed the stages in the same repeat.
    """
    suites = list(dict.fromkeys(run["suite"] for run in report["runs"]))
    groups = ["all", *(suites if len(suites) > 1 else [])]
    entries = []
    for length in report["settings"]["lengths"]:
        for suite in groups:
            for variant in report["variants"]:
                runs = [
                    run
                    for run in report["runs"]
                    if run["length"] == length and suite in ("all", run["suite"])
                ]
                entries.append(_entry(report, variant["name"], suite, length, runs))
    return entries


def _entry(report: Report, name: str, suite: str, length: int, runs: list[Report]) -> Report:
    own = [run for run in runs if run["variant"] == name]
    alone = [run for run in runs if run["variant"] == report["variants"][0]["name"]]
    decode, prefill = speeds(own, "decode"), speeds(own, "prefill")
    ratios = [a / b for a, b in zip(decode, speeds(alone, "decode"), strict=True) if b]
    cycles, accepted = sum(r["cycles"] for r in own), sum(r["accepted"] for r in own)
    verified = sum(r["verified"] for r in own)
    tau = 1 + accepted / cycles if cycles else None
    known = [r["same_tokens"] for r in own if r["same_tokens"] is not None]
    limits = _limits(report, name, length) if suite == "all" else []
    efficiency = [a / b for a, b in zip(decode, limits, strict=True)] if limits else []
    speed = spread(decode)
    return {
        "variant": name,
        "suite": suite,
        "length": length,
        "decode": attrs.asdict(speed),
        "prefill": attrs.asdict(spread(prefill)),
        "ratio": attrs.asdict(spread(ratios)) if ratios else None,
        "peak_bytes": max(r["peak_bytes"] for r in own),
        "tau": tau,
        "acceptance_rate": accepted / verified if verified else None,
        "by_position": _by_position(own),
        "by_window": _by_window(own),
        "efficiency": median(efficiency) if efficiency else None,
        "efficiency_range": [min(efficiency), max(efficiency)] if efficiency else None,
        "limit": median(limits) if limits else None,
        "same": None if not known else sum(known),
        "compared": len(known),
        "fell_back": next((r["fell_back"] for r in own if r["fell_back"]), ""),
    }


def speeds(runs: Sequence[Report], phase: str) -> list[float]:
    """Tokens a second of each repeat, over all its runs; `phase` is ``decode`` or ``prefill``."""
    found = []
    for repeat in sorted({run["repeat"] for run in runs}):
        own = [run for run in runs if run["repeat"] == repeat]
        seconds = sum(run[f"{phase}_seconds"] for run in own)
        count = sum(r["tokens"] - 1 if phase == "decode" else r["prompt_tokens"] for r in own)
        found.append(count / seconds if seconds > 0 else 0.0)
    return found


def _by_position(runs: Sequence[Report]) -> list[float]:
    """Share of accepted draft tokens at each position, among the cycles that verified one."""
    longest = max((len(run["verified_by_position"]) for run in runs), default=0)
    counts = [[0, 0] for _ in range(longest)]
    for run in runs:
        pairs = zip(run["accepted_by_position"], run["verified_by_position"], strict=True)
        for position, (accepted, verified) in enumerate(pairs):
            counts[position][0] += accepted
            counts[position][1] += verified
    return [accepted / verified if verified else 0.0 for accepted, verified in counts]


def _by_window(runs: Sequence[Report]) -> list[float]:
    """tau of the cycles that began in the first, second, ... window of the texts."""
    longest = max((len(run["windows"]) for run in runs), default=0)
    counts = [[0, 0] for _ in range(longest)]
    for run in runs:
        for place, (cycles, accepted) in enumerate(run["windows"]):
            counts[place][0] += cycles
            counts[place][1] += accepted
    return [1 + accepted / cycles for cycles, accepted in counts if cycles]


def _limits(report: Report, name: str, length: int) -> list[float]:
    """Tokens a second of each repeat if a cycle were its draft and its verify and nothing else."""
    for entry in report["stages"]:
        if entry["variant"] == name and entry["length"] == length:
            return entry["limits"] if all(entry["limits"]) else []
    return []


def read_report(file: Path) -> Report:
    """Read what `--json` wrote.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"report {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"report {file} is not JSON", "give what bench --json wrote") from error
    needed = {"format", "machine", "versions", "settings", "variants", "runs", "summary"}
    if not isinstance(report, dict) or not needed <= report.keys():
        raise UsageError(f"{file} is no benchmark report", "give what bench --json wrote")
    if report["format"] != FORMAT:
        raise UsageError(f"{file} has format {report['format']}, this version reads {FORMAT}")
    return report
