"""The processes that train one drafter together, a device each (`mlx.launch`).

Every process takes its own sequences of a batch; what they found is averaged by one reduction a
step. It carries a few numbers more, by which all processes know the same clock, and end together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from draftloom.errors import DraftloomError, UsageError

from .weights import apart, in_a_row

__all__ = ["Group", "Signals"]

PIECE = 2**26
"""Numbers of a reduction at most, unless one array has more: 256 MiB are copied at once."""
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")


@attrs.frozen
class Signals:
    """What a process tells the others along with its gradient, and what it hears.

    Attributes:
        clock: seconds trained, of process 0.
        stop: whether to stop after this step: said by any.
        failed: whether a process has failed: its gradient was none.
        leaving: whether this process is done; heard, whether all are.
    """

    clock: float = 0.0
    stop: bool = False
    failed: bool = False
    leaving: bool = False


class Group:
    """The processes of a run; of a process that was started alone, itself.

    Args:
        inner: MLX's group; None is a process alone.

    Attributes:
        rank: number of this process, from 0.
        size: N, how many there are.
    """

    def __init__(self, inner: mx.distributed.Group | None = None) -> None:
        self._inner = inner
        self.rank = 0 if inner is None else inner.rank()
        self.size = 1 if inner is None else inner.size()

    @classmethod
    def join(cls, environment: Mapping[str, str] = os.environ) -> Group:
        """The group that the environment tells of. Nothing is begun where it tells of none.

        Raises:
            UsageError: the environment tells of several processes, and they do not come together.
        """
        if not any(name in environment for name in _LAUNCHED) or _alone(environment):
            return cls()
        backend = "any"
        if "NCCL_HOST_IP" in environment:
            backend = "nccl"
        elif "MLX_HOSTFILE" in environment:
            backend = "ring"
        try:
            inner = mx.distributed.init(strict=True, backend=backend)
        except RuntimeError as error:
            raise UsageError(
                f"started as one of several processes, which do not come together: {error}",
                "see mlx.launch --help; to train with one process unset MLX_RANK",
            ) from error
        return cls(inner)

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which writes, measures and speaks."""
        return self.rank == 0

    def say(self, message: str) -> str:
        """`message`, with the number of the process where there are several."""
        return message if self.size == 1 else f"process {self.rank} of {self.size}: {message}"

    def average(
        self, gradient: Any, told: mx.array, signals: Signals
    ) -> tuple[Any, mx.array, mx.array]:
        """The mean over the processes of gradients and numbers; launched, not waited for.

        Each process counts alike, as is usual: its loss is a weighted mean over its own slots, and
        the mean of these is the mean over all slots where the sums of weights are equal.

        Args:
            gradient: tree of float32 arrays, of the same shapes in every process.
            told: [M] float32 of this process.
            signals: of this process.

        Returns:
            The mean gradient; [M] means; [4] for `heard`.
        """
        own = [
            signals.clock * self.size if self.leads else 0.0,
            float(signals.stop),
            float(signals.failed),
            float(signals.leaving),
        ]
        flat: Any = sorted(tree_flatten(gradient), key=lambda item: item[0])
        arrays = [mx.concatenate([told, mx.array(own)]), *(value for _, value in flat)]
        told_now, *means = self._means(arrays)
        names = [name for name, _ in flat]
        found = tree_unflatten(list(zip(names, means, strict=True)))
        return found, told_now[:-4], told_now[-4:]

    def _means(self, arrays: list[mx.array]) -> list[mx.array]:
        """Means of float32 arrays, few large reductions for many arrays. They are launched one
        after another, in the same order everywhere: processes that differ here wait for ever."""
        pieces: list[list[mx.array]] = [[]]
        for array in arrays:
            if pieces[-1] and sum(a.size for a in pieces[-1]) + array.size > PIECE:
                pieces.append([])
            pieces[-1].append(array)
        means: list[mx.array] = []
        for piece in pieces:
            row = mx.distributed.all_sum(in_a_row(piece), group=self._inner) / self.size
            mx.async_eval(row)
            means += apart(row, piece)
        return means

    @staticmethod
    def heard(numbers: list[float]) -> Signals:
        """What the [4] of `average` say, the same in every process."""
        clock, stop, failed, leaving = numbers
        return Signals(clock, stop > 0, failed > 0, leaving == 1)

    def leave(self, parameters: Any, told: int, *, failed: bool) -> bool:
        """Take part in the others' steps, with gradients of 0, until all are leaving.

        Args:
            parameters: whose shapes gradients have.
            told: M of `average`.
            failed: whether this process failed, which ends the others too.

        Returns:
            Whether none has failed, or was lost.
        """
        if self.size == 1:
            return not failed
        flat: Any = tree_flatten(parameters)
        zeros = tree_unflatten([(name, mx.zeros_like(value)) for name, value in flat])
        mine, well = Signals(failed=failed, leaving=True), not failed
        while True:
            try:
                *_, signals = self.average(zeros, mx.zeros(told), mine)
                numbers: Any = signals.tolist()
            except RuntimeError:  # the others are gone
                return False
            heard = self.heard(numbers)
            well = well and not heard.failed
            if heard.leaving:
                return well

    @staticmethod
    def was_lost(error: BaseException) -> bool:
        """Whether `error` says that a process is gone. Nothing may be asked of the group then: what
        MLX's ring is given after it has failed what was pending may be waited for in vain."""
        return isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)

    def agree(self, began: tuple[Any, Any] | None) -> None:
        """See, before the first step, that all processes came so far, and begin alike.

        Args:
            began: JSON data that settings and files follow from, and the float32 parameters; None
                in a process that failed, and raises its own error then.

        Raises:
            DraftloomError: another process failed.
            UsageError: another one begins with something else; says who and with what.
        """
        if self.size == 1:
            return
        own = [0, 0, 0] if began is None else [1, _of_data(began[0]), _of_weights(began[1])]
        table = mx.where(mx.arange(self.size)[:, None] == self.rank, mx.array(own), 0)
        table = table.astype(mx.float32)
        try:
            rows: Any = mx.distributed.all_sum(table, group=self._inner).tolist()
        except RuntimeError as error:
            if began is None:
                return
            raise DraftloomError(f"another process is gone: {error}", "start all again") from error
        if began is None:
            return
        gone = [str(rank) for rank, row in enumerate(rows) if not row[0]]
        if gone:
            raise DraftloomError(
                f"process {', '.join(gone)} failed before the first step", "it says why"
            )
        for column, what in ((1, "settings or data"), (2, "weights")):
            other = [str(r) for r, row in enumerate(rows) if row[column] != rows[0][column]]
            if other:
                raise UsageError(
                    f"process {', '.join(other)} begins with other {what} than process 0",
                    "start all with the same command, files and versions",
                )


def _of_data(value: Any) -> int:
    """A number below 2^24, which a float32 holds exactly; equal for equal JSON data."""
    body = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(body).digest()[:3], "big")


def _of_weights(parameters: Any) -> int:
    """The same of a tree of float32 arrays. Their bits are summed, so that nothing is rounded."""
    flat: Any = sorted(tree_flatten(parameters), key=lambda item: item[0])
    sums: Any = mx.stack([array.view(mx.uint32).sum() for _, array in flat]).tolist()
    return _of_data(sums)


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether the environment tells of one process only."""
    if environment.get("MLX_WORLD_SIZE") == "1":
        return True
    hosts = environment.get("MLX_HOSTFILE")
    try:
        return bool(hosts) and not Path(str(hosts)).read_text(encoding="utf-8").strip()
    except OSError:  # MLX says what is wrong with it
        return False
