"""Functions traced by `mx.compile`, kept by the form of what they are given."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import mlx.core as mx

__all__ = ["Traces"]

T = TypeVar("T")


class Traces(Generic[T]):
    """What was traced, for each form, device and thread.

    Args:
        most: forms that are kept; the one that was not used for longest goes first.

    Attributes:
        traced: how many forms were traced so far.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self.traced = 0

    def of(self, form: Hashable, make: Callable[[], T]) -> T:
        """The trace of a form, made if there is none."""
        key = (form, str(mx.default_device()), threading.get_ident())
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make()
            self.traced += 1
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        elif found is not next(reversed(self._kept.values())):  # else it is the last already
            self._kept.move_to_end(key)
        return found

    def clear(self) -> None:
        """Drop them all, and what they hold; the counts stay."""
        self._kept.clear()
