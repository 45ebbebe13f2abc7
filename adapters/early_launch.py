"""Layers that are launched while later ones are still being put together.

MLX is lazy: a pass runs when its end is asked for, and until then Python builds its graph while the
device waits. With early launches the output of some layers is handed to the device on the way, so
that it works on the first ones while the host builds the rest. No value changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from draftloom.contracts import ComponentInfo
from draftloom.kernel_settings import KernelSettings
from draftloom.kernels.check import Check
from draftloom.kernels.stand_in import StandIn

__all__ = ["OPERATION", "EarlyLaunch", "Places", "eighths", "every_layer"]

OPERATION = "early-launch"


class Places:
    """Where a pass is launched on the way.

    Args:
        name: of the implementation.
        summary: for listings.
        parts: pieces of about equal length; None is one a layer.
    """

    SLOW_CHECKS = True

    def __init__(self, name: str, summary: str, parts: int | None) -> None:
        self.name = name
        self.info = ComponentInfo(f"{OPERATION}/{name}", summary)
        self._parts = parts

    def places(self, count: int) -> Sequence[int]:
        """Numbers of the layers, of `count`, whose output is launched; never the last, which the
        end of the pass launches."""
        parts = count if self._parts is None else min(self._parts, count)
        return sorted({count * (i + 1) // parts - 1 for i in range(parts - 1)})

    def checks(self) -> Iterator[Check]:
        """A stack of layers with launches on the way gives the very bits of one without."""
        for dtype, rows in ((mx.float32, 7), (mx.bfloat16, 1)):
            yield _check(self.name, dtype, rows)


def _check(name: str, dtype: mx.Dtype, rows: int) -> Check:
    keys = mx.random.split(mx.random.key(3), 10)
    inputs = mx.random.normal((1, rows, 64), key=keys[0]).astype(dtype)
    layers: list[nn.Module] = []
    for key in keys[1:]:
        layer = nn.Linear(64, 64, bias=False)
        layer.weight = (mx.random.normal((64, 64), key=key) / 8).astype(dtype)
        layers.append(layer)

    def run(choice: str) -> list[mx.array]:
        launches, x = EarlyLaunch(layers), inputs
        launches.tune(KernelSettings.of({OPERATION: choice}))
        for layer in layers:
            x = nn.silu(layer(x))
        launches.restore()
        return [x]

    kind = str(dtype).rpartition(".")[2]
    label = f"9 layers {kind} T{rows} D64"
    return Check(label, lambda: run(name), lambda: run("off"), (0.0,))


eighths = Places("eighths", "a pass in eight pieces", 8)
every_layer = Places("every-layer", "a pass layer by layer", None)
_BUILT_IN = {part.name: part for part in (eighths, every_layer)}


class _LaunchLayer(StandIn):
    """Calls a decoder layer and launches what it gave."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        mx.async_eval(output)
        return output


class EarlyLaunch:
    """Puts launches into a model's list of layers and takes them out again. Taps go on top: they
    are set after, and cleared before.

    Args:
        layers: the model's own list; None where its layers cannot be exchanged.
    """

    def __init__(self, layers: list[nn.Module] | None) -> None:
        self._layers = layers
        self._originals: dict[int, nn.Module] = {}

    def tune(self, settings: KernelSettings) -> None:
        """Launch as the operation ``early-launch`` is chosen: nowhere by default."""
        self.restore()
        chosen = settings.use(OPERATION, off="")
        part = _BUILT_IN.get(chosen) if isinstance(chosen, str) else chosen
        if part is None or self._layers is None:
            return
        for index in part.places(len(self._layers)):
            self._originals[index] = self._layers[index]
            self._layers[index] = _LaunchLayer(self._layers[index])

    def restore(self) -> None:
        """Put every layer back."""
        for index, layer in self._originals.items():
            assert self._layers is not None
            self._layers[index] = layer
        self._originals.clear()
