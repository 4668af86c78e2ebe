"""Fixtures and marks for every test."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.ranks import RankPools


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """`ranks(n).run(function, *args)` runs a module-level function on n ranks of one gloo group; see `tests.ranks`."""
    pools = RankPools()
    yield pools
    pools.stop()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_ranks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Like `ranks`, on CPUs and, where there are any, on GPUs; functions find their device by themselves."""
    if request.param == "cpu":
        yield request.getfixturevalue("ranks")
        return
    from scripts.gpu_ranks import GpuPools

    pools = GpuPools()
    yield pools
    pools.stop()


@pytest.hookimpl(tryfirst=True)  # before -m selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"ranks", "device_ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.multiproc)
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
