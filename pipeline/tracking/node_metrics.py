"""Load of a node while a job runs: processor, memory, disk, network and GPUs, under the names that MLflow shows.

MLflow's page shows metrics that begin with `system/` under "System metrics".
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psutil

logger = logging.getLogger(__name__)

INTERVAL_S = 15.0
"""between two samples of a node"""
_MIB = 2**20

LogLoad = Callable[[Mapping[str, float]], None]


def sample_node(node: str, before: Any) -> dict[str, float]:
    """One sample of this machine, named `system/<node>/...`.

    before  `psutil.net_io_counters` from which the network is counted, in MB

    Processor in percent since the calling thread's sample before, memory and disk in MiB and percent; for every GPU
    that torch can see utilization in percent and memory in MiB.
    """
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MIB,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_megabytes": disk.used / _MIB,
        "disk_usage_percentage": disk.percent,
    }
    if network is not None and before is not None:
        found["network_receive_megabytes"] = (network.bytes_recv - before.bytes_recv) / 1e6
        found["network_transmit_megabytes"] = (network.bytes_sent - before.bytes_sent) / 1e6
    return {f"system/{node}/{name}": float(value) for name, value in {**found, **_gpus()}.items()}


def _gpus() -> dict[str, float]:
    import torch  # not before: the command line imports this file, and torch takes seconds

    found: dict[str, float] = {}
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            found[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / _MIB
            found[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
            found[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization(index)
        except (RuntimeError, ModuleNotFoundError) as error:  # NVIDIA's management library is optional
            logger.debug("GPU %d cannot be sampled: %s", index, error)
    return found


class NodeSampler:
    """Samples this node every `interval_s` seconds, the first time after one interval, until `close`.

    The network is counted from the start of the sampler, as MLflow's own metrics are.
    """

    def __init__(self, log_load: LogLoad, *, interval_s: float = INTERVAL_S, node: str | None = None) -> None:
        self._log_load, self._interval_s = log_load, interval_s
        self._node = node or platform.node() or "node"
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="node-metrics", daemon=True).start()

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        psutil.cpu_percent()  # the first call of a thread has nothing to compare with
        before = psutil.net_io_counters()
        while not self._ended.wait(self._interval_s):
            try:
                self._log_load(sample_node(self._node, before))
            except Exception as error:  # a sample is never worth the job
                logger.debug("This node could not be sampled: %s", error)
