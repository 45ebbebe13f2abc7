"""Which groups of layers are run as one product: by name, by a table, or by timing them here."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import mlx.core as mx
import mlx.nn as nn

from draftloom.device import on_cuda
from draftloom.kernels.check import Check

from .product import OneProduct

__all__ = [
    "PAYS",
    "PLANS",
    "Decision",
    "Groups",
    "Plan",
    "backend",
    "decide",
    "pays",
    "ratios",
]

Groups = Mapping[str, Sequence[Sequence[Any]]]
"""By kind (``mlp``): the layers of each place that could be one product."""
Way = Callable[[mx.array], list[mx.array]]
"""What each layer of a place gives."""

PAYS: dict[str, dict[str, frozenset[str]]] = {
    "packed-projections": {
        "cpu": frozenset(),
        "cuda": frozenset({"attention", "gated-delta", "mlp"}),
        "metal": frozenset(),
    },
    "packed-drafter": {
        "cpu": frozenset(),
        "cuda": frozenset({"attention", "context", "mlp"}),
        "metal": frozenset(),
    },
}
"""What ``auto`` packs, by operation and backend. On the CPU it was timed and made no difference; on
CUDA all kinds together were timed and paid (docs/explanation/performance.md). Metal is empty
because nothing was timed there yet: docs/benchmarks/packed_projections.py does."""

TOKENS = (1, 16)
"""Widths that are timed: a plain step and a block."""
WORTH = 0.98
"""Share of the time of separate products below which one product is taken."""
_PLACES, _BYTES = 4, 2**28
"""Places of a kind that are timed at most, one after the other so that caches hold not only one;
and about the most memory that they may take beside the model."""
_RUNS = 20
"""Runs that should fit into the time."""
_log = logging.getLogger("draftloom.kernels")


@attrs.frozen
class Decision:
    """What is packed.

    Attributes:
        kinds: of the groups.
        reason: for people.
    """

    kinds: frozenset[str]
    reason: str


class Plan(Protocol):
    """An implementation of ``packed-projections`` or ``packed-drafter``."""

    def choose(self, groups: Groups) -> Decision:
        """Which kinds of these groups to pack."""


@attrs.frozen
class _Named:
    """Packs these kinds, as far as there are any."""

    operation: str
    kinds: frozenset[str]

    def choose(self, groups: Groups) -> Decision:
        return Decision(frozenset(groups.keys() & self.kinds), "it was asked for")

    def by_default(self) -> bool:
        """Whether `auto` packs these kinds here."""
        return self.kinds <= pays(self.operation)

    def checks(self) -> Iterator[Check]:
        """Parity with separate products."""
        from .checks import checks_of

        return checks_of(self.kinds)


@attrs.frozen
class _Measured:
    """Packs what is faster here, by timing some places of each kind.

    Attributes:
        seconds: for all kinds together, about.
    """

    seconds: float = 0.8

    def choose(self, groups: Groups) -> Decision:
        found = {
            kind: ratios(places, self.seconds / len(groups)) for kind, places in groups.items()
        }
        mx.clear_cache()
        share = {kind: statistics.fmean(by.values()) for kind, by in found.items()}
        kinds = frozenset(kind for kind, value in share.items() if value < WORTH)
        each = (
            f"{kind} {', '.join(f'{by[tokens]:.2f} at {tokens}' for tokens in by)}"
            for kind, by in found.items()
        )
        return Decision(kinds, "time packed over separate, by tokens: " + "; ".join(each))


def _plans(operation: str, kinds: Sequence[str]) -> dict[str, Plan]:
    each = {kind: _Named(operation, frozenset({kind})) for kind in kinds}
    return {"packed": _Named(operation, frozenset(kinds)), **each, "measure": _Measured()}


PLANS: dict[str, dict[str, Plan]] = {
    "packed-projections": _plans("packed-projections", ("attention", "gated-delta", "mlp")),
    "packed-drafter": _plans("packed-drafter", ("attention", "context", "mlp")),
}
"""The implementations, by operation and name."""


def backend() -> str:
    """``cpu``, ``cuda`` or ``metal``: where arrays are computed by default."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "cuda" if on_cuda() else "metal"


def pays(operation: str) -> frozenset[str]:
    """The kinds of groups that ``auto`` packs on this backend."""
    return PAYS[operation][backend()]


def decide(operation: str, use: Any, groups: Groups) -> Decision:
    """What of a model to pack; it is logged, and what was measured is shown (as a warning).

    Args:
        operation: ``packed-projections`` or ``packed-drafter``.
        use: None for the table, ``off``, the name of an implementation, or a `Plan` itself.
        groups: by kind: the layers of each place.
    """
    if not groups or use == "off":
        return Decision(frozenset(), "nothing can be packed" if not groups else "it is off")
    if use is None:
        decision = Decision(frozenset(pays(operation) & groups.keys()), f"what pays on {backend()}")
    else:
        plan: Plan = PLANS[operation][use] if isinstance(use, str) else use
        decision = plan.choose(groups)
    listing = ", ".join(sorted(decision.kinds)) or "nothing"
    level = logging.WARNING if use == "measure" else logging.INFO
    _log.log(level, "%s: packs %s (%s)", operation, listing, decision.reason)
    return decision


def ratios(
    places: Sequence[Sequence[Any]], seconds: float, tokens: Iterable[int] = TOKENS
) -> dict[int, float]:
    """Time of one product over that of separate ones, at the places' own shapes, by tokens.

    A few places run one after the other, each on what the one before gave; both ways take turns.
    What is read of a product is read by one elementwise operation, as a model would.

    Args:
        places: the layers of each place. They are left as they are.
        seconds: about how long it may take.
        tokens: widths.
    """
    held = sum(layer[name].nbytes for layer in places[0] for name in layer)
    count = max(1, min(len(places), _PLACES, _BYTES // held))
    some = places[:: len(places) // count][:count]
    products = [OneProduct(layers) for layers in some]
    mx.eval([product.arrays for product in products])
    separate: list[Way] = [
        lambda x, layers=layers: [layer(x) for layer in layers]  # type: ignore[misc]
        for layers in some
    ]
    found = {}
    widths = tuple(tokens)
    for width in widths:
        x = mx.random.normal((1, width, _width(some[0][0])), key=mx.random.key(width))
        x = x.astype(_compute_type(some[0][0]))
        found[width] = _ratio(separate, list(products), x, seconds / len(widths))
    return found


def _width(layer: Any) -> int:
    rows = layer["weight"].shape[1]
    return int(rows * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else rows)


def _compute_type(layer: Any) -> mx.Dtype:
    quantized = isinstance(layer, nn.QuantizedLinear)
    dtype: mx.Dtype = layer["scales" if quantized else "weight"].dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16


def _ratio(separate: Sequence[Way], single: Sequence[Way], x: mx.array, seconds: float) -> float:
    """Median of the ratios of neighbouring runs, single over separate. Where one place alone takes
    long, as on a slow CPU, it stands for the others."""
    for ways in (separate, single):  # the first run of a shape makes its kernels
        _run(ways[:1], x)
    count = max(1, int(seconds / _RUNS / _run(separate[:1], x)))
    separate, single = separate[:count], single[:count]
    end = time.perf_counter() + seconds
    taken: list[float] = []
    while not taken or time.perf_counter() < end:
        if len(taken) % 2:
            one, apart = _run(single, x), _run(separate, x)
        else:
            apart, one = _run(separate, x), _run(single, x)
        taken.append(one / apart)
    return statistics.median(taken)


def _run(ways: Sequence[Way], x: mx.array) -> float:
    """Seconds of places one after the other."""
    start, h = time.perf_counter(), x
    for way in ways:
        read = [part * part for part in way(h)]
        h = x + sum(part[..., :1] for part in read[1:]) * read[0][..., :1]
    mx.eval(h)
    return time.perf_counter() - start
