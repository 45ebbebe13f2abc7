"""Gradients and optimizer updates as functions of arrays alone, traced once if that is asked for.

Nothing here reads a number back: a step is launched, and the next one prepared, while the device
works.
"""

from __future__ import annotations

from typing import Any

import attrs
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .settings import OPTIMIZERS, TrainSettings
from .step import BlockBatch, DrafterLoss
from .weights import apart, in_a_row, in_order

__all__ = ["Updates", "begin_state", "make_optimizer"]


def make_optimizer(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer that the settings ask for."""
    adamw = optim.AdamW(
        settings.peak,
        betas=list(settings.betas),
        weight_decay=settings.weight_decay,
        bias_correction=True,
    )
    if settings.optimizer == "adamw":
        return adamw
    muon = optim.Muon(settings.peak, weight_decay=settings.weight_decay)
    return optim.MultiOptimizer([muon, adamw], [lambda name, value: value.ndim >= 2])


def set_rate(optimizer: optim.Optimizer, rate: mx.array) -> None:
    """Set the learning rate. Of Muon's, AdamW's part takes the share that their own rates have."""
    if isinstance(optimizer, optim.MultiOptimizer):
        muon, adamw = optimizer.optimizers
        muon.learning_rate = rate
        adamw.learning_rate = rate * (OPTIMIZERS["adamw"] / OPTIMIZERS["muon"])
    else:
        optimizer.learning_rate = rate


def _in_a_row(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer treats every number alike, so that all may lie in one array. A dozen
    launches then update a model, not a dozen for each of its arrays."""
    return not isinstance(optimizer, optim.MultiOptimizer)


def _row(tree: Any) -> mx.array:
    """All numbers of a tree in one array."""
    flat: Any = tree_flatten(tree)
    return in_a_row([value for _, value in flat])


def begin_state(optimizer: optim.Optimizer, parameters: Any, state: Any) -> Any:
    """The state that a run begins or goes on with.

    Args:
        optimizer: whose state it becomes.
        parameters: in order.
        state: as it was saved; before the first step, what the optimizer has by itself.
    """
    optimizer.state = state
    if not _in_a_row(optimizer):
        optimizer.init(parameters)
        return optimizer.state
    names: Any = [name for name, _ in tree_flatten(parameters)]
    flat: Any = dict(tree_flatten(state))
    if f"{names[0]}.m" in flat:  # saved when every array had moments of its own
        for moment in "mv":
            flat[f"all.{moment}"] = in_a_row([flat.pop(f"{name}.{moment}") for name in names])
        optimizer.state = tree_unflatten(list(flat.items()))
    optimizer.init({"all": _row(parameters)})
    return optimizer.state


class Updates:
    """The two halves of a step.

    Args:
        loss: of a batch.
        optimizer: its state is exchanged by every call.
        settings: clipping, and whether to compile.
    """

    def __init__(
        self, loss: DrafterLoss, optimizer: optim.Optimizer, settings: TrainSettings
    ) -> None:
        self._loss, self._optimizer, self._clip = loss, optimizer, settings.clip
        wrap: Any = mx.compile if settings.compile else (lambda function: function)
        self._gradients = wrap(self._traced_gradients)
        self._update = wrap(self._traced_update)

    def _traced_gradients(self, parameters: Any, arrays: dict[str, mx.array]) -> Any:
        (loss, shares), gradient = self._loss.gradients(parameters, BlockBatch(**arrays))
        return loss, shares, gradient

    def _traced_update(self, parameters: Any, state: Any, gradient: Any, rate: mx.array) -> Any:
        self._optimizer.state = state
        set_rate(self._optimizer, rate)
        if not _in_a_row(self._optimizer):
            clipped, norm = optim.clip_grad_norm(gradient, self._clip)
            parameters = self._optimizer.apply_gradients(clipped, parameters)
            return in_order(parameters), self._optimizer.state, norm
        rows, norm = optim.clip_grad_norm({"all": _row(in_order(gradient))}, self._clip)
        new = self._optimizer.apply_gradients(rows, {"all": _row(parameters)})["all"]
        flat: Any = tree_flatten(parameters)
        names, old = zip(*flat, strict=True)
        named = list(zip(names, apart(new, old), strict=True))
        return tree_unflatten(named), self._optimizer.state, norm

    def gradients(self, parameters: Any, batch: BlockBatch) -> tuple[mx.array, mx.array, Any]:
        """Loss, [K] shares of right slots, and gradients; all lazy."""
        arrays = attrs.asdict(batch, recurse=False)
        return self._gradients(  # type: ignore[no-any-return]
            parameters, {name: value for name, value in arrays.items() if value is not None}
        )

    @staticmethod
    def mean(gradients: list[Any]) -> Any:
        """The mean of one or more gradients; lazy."""
        if len(gradients) == 1:
            return gradients[0]
        return tree_map(lambda *parts: sum(parts[1:], parts[0]) / len(parts), *gradients)

    def apply(
        self, parameters: Any, state: Any, gradient: Any, rate: float
    ) -> tuple[Any, Any, mx.array]:
        """New parameters, new optimizer state and the norm of the gradient; all lazy.

        Args:
            parameters: float32.
            state: of the optimizer.
            gradient: of this update.
            rate: learning rate.
        """
        return self._update(  # type: ignore[no-any-return]
            parameters, state, gradient, mx.array(rate, dtype=mx.float32)
        )
