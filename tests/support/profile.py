"""How hypothesis is run: the same draws every time, so that a failure in CI is one everywhere."""

import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

__all__ = ["examples"]


def examples(count: int, *case: object) -> Callable[[Any], Any]:
    """Run so many examples, others for every case of a parametrized test.

    A failing example is printed as it is: making it smaller takes minutes here, and they are small.

    Args:
        count: examples.
        *case: the parameters of the test. (Derandomized draws depend on the function alone: every
            family would be given the same ones.)
    """
    chosen = settings(
        phases=(Phase.explicit, Phase.generate),
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    number = zlib.crc32(repr(case).encode())
    return lambda test: seed(number)(chosen(test))
