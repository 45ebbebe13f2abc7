"""How hypothesis is run: the same draws every time, so that a failure in CI is one everywhere."""

from hypothesis import HealthCheck, Phase, settings

__all__ = ["examples"]


def examples(count: int) -> settings:
    """Settings for a test of so many examples. A failing one is printed as it is: making it
    smaller takes minutes here, and cases are small."""
    return settings(
        phases=(Phase.explicit, Phase.generate),
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
