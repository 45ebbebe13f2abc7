"""What cycles cost here: measured once for a pipeline and a machine, and kept.

The engine itself is timed, with widths dictated, over a made-up text: a plain cycle, and cycles of
a few widths. What costs depend on is part of the key under which they are kept: the structure of
the weights (names, shapes, types; not their values), the components, kernels, device, versions.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten

from draftloom.abilities import Traces
from draftloom.contracts import ComponentInfo, Width
from draftloom.costs import CycleCosts
from draftloom.engine import Engine
from draftloom.errors import DraftloomError
from draftloom.memory import UsesMemory
from draftloom.mismatch import MismatchMonitor
from draftloom.parts import EngineParts, EngineRequest
from draftloom.sampling import SamplingParams
from draftloom.self_test_record import fingerprint
from draftloom.spec import PipelineSpec
from draftloom.user_files import cache_folder, write_whole

__all__ = ["CycleTimer", "calibrate", "costs_folder"]

_log = logging.getLogger("draftloom.calibration")
SECONDS = 3.0
"""How long measuring may take, about."""
WARM_UP = 6.0
"""After how long no further width of a target that traces its passes is warmed up."""
CYCLES = 3
"""Timed cycles of a width, after one that is not; the median counts."""
PLAIN_CYCLES = 8
WIDTHS = (1, 4, 15, 2, 8, 31)
"""In this order, as far as the time goes and the drafter goes."""


class _Dictated:
    """A width policy that does what it is told."""

    info = ComponentInfo("dictated")

    def __init__(self, draft: int, verify: int) -> None:
        self._draft, self._verify = draft, verify

    def choose(self, limit: int) -> Width:
        return Width(min(self._draft, limit), min(self._verify, limit))

    def observe(self, drafted: int, verified: int, accepted: int, seconds: float) -> None:
        """Nothing to learn."""


class _Unheard:
    """In place of the hooks: nobody is told of cycles that belong to no text."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda **_: None


class CycleTimer:
    """Times cycles of a built pipeline.

    Args:
        parts: of the pipeline; its width policy, observers and alarm are left out of it.
    """

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts

    def measure(self, seconds: float = SECONDS) -> CycleCosts | None:
        """Costs; None where the drafter proposes nothing.

        Args:
            seconds: about how long it may take, beside the tracing of passes. A plain cycle and
                the first width are measured whatever they take; another where the time should
                suffice.

        Raises:
            DraftloomError: the target failed, or its context is too short.
        """
        target, most = self._parts.target, self._parts.drafter.info.max_width
        if not self._parts.drafter.info.default_width:
            return None
        widths = list(dict.fromkeys(w if most is None else min(w, most) for w in WIDTHS))
        traces = isinstance(target, Traces) and target.traces
        if traces:
            widths = self._warm_up(widths)
        began = time.perf_counter()
        plain = self.cycle_seconds(0, PLAIN_CYCLES)
        points: dict[int, float] = {}
        for width in widths:
            if points:
                widest = max(points)
                expected = points[widest] * max(1.0, (width + 1) / (widest + 1))
                if time.perf_counter() - began + expected * (CYCLES + 1) > seconds:
                    continue
            took = self.cycle_seconds(width, CYCLES) if width else None
            if took is not None:
                points[width] = took
        if plain is None or not points:
            return None
        slots, least = None, min(points)
        if most is not None and most > least:
            full = self.cycle_seconds(least, CYCLES, draft=most)
            slots = None if full is None else full - points[least]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return CycleCosts(plain, tuple(sorted(points.items())), slots, stamp, alone=traces)

    def _warm_up(self, widths: list[int]) -> list[int]:
        """Run cycles of some widths, so that what they trace and compile is there when they are
        timed; which of these widths that was done for, in the time that there is."""
        began, done = time.perf_counter(), set[int]()
        self.cycle_seconds(0, 1)
        for width in (max(widths[:3]), *widths[:3]):  # the most first: what it compiles serves all
            if done and time.perf_counter() - began > WARM_UP:
                break
            if width not in done:
                self.cycle_seconds(width, 2)
                done.add(width)
        return [width for width in widths if width in done]

    def cycle_seconds(self, width: int, count: int, draft: int | None = None) -> float | None:
        """Median seconds of `count` cycles after a first one; None where the drafter did not
        propose `width` tokens so often.

        Args:
            width: draft tokens to verify.
            count: cycles.
            draft: tokens to draft; by default as many.

        Raises:
            DraftloomError: the target failed, or its context is too short.
        """
        parts = attrs.evolve(
            self._parts,
            width=_Dictated(width if draft is None else draft, width),
            hook=_Unheard(),
            monitor=MismatchMonitor(self._parts.drafter.info),
        )
        vocabulary = parts.target.info.vocab_size
        # A pattern that repeats: prompt lookup finds something to propose too.
        prompt = tuple(token % vocabulary for token in (7, 11, 13, 17)) * 8
        request = EngineRequest(prompt, (width + 1) * (count + 4), SamplingParams())
        engine, taken = Engine(parts, request), []
        cycles = engine.cycles()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a drafter that fails is spoken of where it matters
            for event in cycles:
                if event.index and event.verified == width:
                    taken.append(event.seconds)
                if len(taken) > count:
                    break
        cycles.close()
        engine.finish()
        return statistics.median(taken[1:]) if len(taken) > count else None


def costs_folder() -> Path:
    """Where costs are kept: ``draftloom/costs`` in XDG_CACHE_HOME or ~/.cache."""
    return cache_folder() / "costs"


def calibrate(parts: EngineParts, spec: PipelineSpec, *, fresh: bool = False) -> CycleCosts | None:
    """Costs of a pipeline here: as kept, or measured now and kept.

    Args:
        parts: the built pipeline.
        spec: what it was built from, defaults filled in.
        fresh: measure in any case.

    Returns:
        None where they cannot be measured: the drafter proposes nothing, the context is too short.
    """
    key = _key(parts, spec)
    text = json.dumps(key, sort_keys=True)
    path = costs_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if not fresh:
        try:
            return CycleCosts.of(json.loads(path.read_text(encoding="utf-8"))["costs"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.info("%s is measured again: %s", path, error)
    try:
        costs = CycleTimer(parts).measure()
    except DraftloomError as error:
        _log.info("cycles cannot be timed: %s", error)
        return None
    finally:
        gc.collect()  # the caches of the made-up text go before the first text needs room
        mx.clear_cache()
    if costs is not None:
        _log.info("a plain cycle takes %.2f ms, by width %s", 1e3 * costs.plain, costs.widths)
        kept = {"key": key, "costs": costs.as_data()}
        try:
            write_whole(path, json.dumps(kept, indent=1))
        except OSError as error:  # measured again next time
            _log.info("costs are not kept: %s", error)
    return costs


def _key(parts: EngineParts, spec: PipelineSpec) -> dict[str, Any]:
    """Everything that costs depend on, as plain data."""
    digest = hashlib.sha256()
    for name, value in sorted(tree_flatten(parts.target.model.parameters())):
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
    drafter = parts.drafter
    plain = attrs.evolve(spec, target="", width=type(spec)().width, sampling=())
    pipeline = json.dumps(attrs.asdict(plain), sort_keys=True, default=_name_of)
    return {
        "target": digest.hexdigest(),
        "drafter_bytes": drafter.memory() if isinstance(drafter, UsesMemory) else None,
        "pipeline": pipeline,
        "here": fingerprint(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
    }


def _name_of(value: Any) -> str:
    """What stands for an option that is no plain data: a path, a model that is loaded already."""
    return str(value) if isinstance(value, Path) else type(value).__name__
