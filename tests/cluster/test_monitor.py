"""What travels between driver and workers, on a real local Ray; and one job of a run on a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from refinedet.pipeline.cluster import monitor as module
from refinedet.pipeline.cluster.monitor import Monitor, MonitorClient
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_session(Cluster(workers=1), "local"):
        yield


def test_messages_arrive_in_order_and_the_wish_to_stop_comes_back() -> None:
    with Monitor("s3://bucket/runs/messages") as monitor:
        client = MonitorClient(monitor.name, rank=3)
        for step in range(20):
            client.push("step", step)
        client.push("event", "last", wait=True)
        assert monitor.drain() == [*((3, "step", step) for step in range(20)), (3, "event", "last")]
        assert not client.stop_requested
        monitor.set_stop(True)
        client.push("step", 20, wait=True)
        assert client.stop_requested
    client.push("step", 21, wait=True)  # nobody is there any more: no step is lost for that


def test_a_run_has_one_job_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FREED_WITHIN_S", 1.0)
    with (
        Monitor("s3://bucket/runs/r"),
        Monitor("s3://bucket/runs/other"),
        pytest.raises(UserError, match="Another job of this cluster works on the run s3://bucket/runs/r; wait for it"),
    ):
        Monitor("s3://bucket/runs/r")
    monkeypatch.setattr(module, "_FREED_WITHIN_S", 30.0)
    with Monitor("s3://bucket/runs/r") as again:
        assert again.drain() == []
