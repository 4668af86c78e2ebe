"""Fixtures and marks for every test."""

from collections.abc import Iterator

import pytest

from tests.ranks import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(function, *args)` runs a module-level function on n ranks of one gloo group; see `tests.ranks`."""
    pools = RankPools()
    yield pools
    pools.stop()


@pytest.hookimpl(tryfirst=True)  # before -m selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.multiproc)
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
