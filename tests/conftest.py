"""What every test folder shares: where tests run, and which are skipped or kept together."""

from collections.abc import Iterator

import mlx.core as mx
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


class OneTestAtATime(LoadScopeScheduling):
    """Hands out single tests, but a document as one: its snippets build on each other.

    (xdist's own `loadgroup` would do, but it cannot rename tests in the pytest we pin.)
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return nodeid if path.endswith(".py") else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneTestAtATime:
    """Replace xdist's scheduler."""
    return OneTestAtATime(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    if mx.is_available(mx.gpu):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: mlx has neither Metal nor CUDA here"))


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run on the CPU, the exact oracle for losslessness, unless the test is marked `gpu`."""
    before = mx.default_device()
    mx.set_default_device(mx.gpu if request.node.get_closest_marker("gpu") else mx.cpu)
    yield
    mx.set_default_device(before)
