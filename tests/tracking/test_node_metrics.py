from __future__ import annotations

import itertools
import queue
import threading
import time
from types import SimpleNamespace

import psutil
from refinedet.pipeline.tracking.node_metrics import NodeSampler


def test_a_node_is_sampled_under_mlflows_names():
    samples: list[dict[str, float]] = []
    sampler = NodeSampler(lambda values: samples.append(dict(values)), interval_s=0.01, node="host-1")
    deadline = time.monotonic() + 60
    while not samples and time.monotonic() < deadline:
        time.sleep(0.01)
    sampler.close()
    assert 0 < samples[0]["system/host-1/system_memory_usage_percentage"] <= 100
    assert all(name.startswith("system/host-1/") for name in samples[0])


def test_a_nodes_first_sample_compares_with_the_samplers_start(monkeypatch):
    """psutil keeps the processor's times of each thread apart: the first call of a thread returns 0."""
    threads: list[int] = []
    received = itertools.count(10**12, 5 * 10**6)
    monkeypatch.setattr(psutil, "cpu_percent", lambda: threads.append(threading.get_ident()) or 50.0)
    counters = lambda: SimpleNamespace(bytes_recv=next(received), bytes_sent=7)  # noqa: E731
    monkeypatch.setattr(psutil, "net_io_counters", counters)
    samples: queue.Queue[dict[str, float]] = queue.Queue()
    sampler = NodeSampler(lambda values: samples.put(dict(values)), interval_s=0.01, node="n")
    first = samples.get(timeout=60)
    sampler.close()
    assert first["system/n/network_receive_megabytes"] == 5
    assert first["system/n/network_transmit_megabytes"] == 0
    assert len(threads) >= 2
    assert len(set(threads)) == 1
