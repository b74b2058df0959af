"""One Ray for all tests here: a small cluster, to which this process is connected too where a test requires it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.drills.bench import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A small Ray cluster, and specs for it."""
    bench = Bench(tmp_path_factory.mktemp("jobs"))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def connected(bench: Bench) -> Iterator[None]:
    """This process as a driver on that cluster."""
    with ray_session(Cluster(workers=1), bench.cluster.address):
        yield
