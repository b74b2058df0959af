"""How many workers can run now, and where: asked of Ray by reserving their places for a moment.

Ray Train itself would wait for ever for places that never come, and its elastic policy takes any number of workers,
also one that does not divide the global batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import JobError

_SLICE_S = 0.5
_PATIENCE_S = 5.0
"""An elastic job waits this long for its largest size before it takes a smaller one."""
NODE_LABEL = "ray.io/node-id"


class Placement:
    """Places for the workers of one job, but for those on nodes that are left out."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.left_out: set[str] = set()
        """ids of nodes"""

    def find(self, sizes: Sequence[int], on_wait: Callable[[], None], stopped: Callable[[], bool]) -> int | None:
        """The largest of `sizes` that can be placed now, or soon; None once `stopped` says so.

        sizes    largest first
        on_wait  called once where nothing can be placed at once
        Raises JobError after `resource_timeout_s`. Nodes that were left out count again where it goes not without.
        """
        deadline = time.monotonic() + self._cluster.resource_timeout_s
        said = False
        while not stopped():
            for size in sizes:
                if self.fits(size, _PATIENCE_S if size == sizes[0] else _SLICE_S, stopped):
                    return size
            if self.left_out:
                self.left_out.clear()
                continue
            if not said:
                on_wait()
                said = True
            if time.monotonic() > deadline:
                there = ", ".join(f"{amount:g} {name}" for name, amount in sorted(_total().items()))
                raise JobError(
                    f"no place for {sizes[-1]} workers came within {self._cluster.resource_timeout_s:g} s, the cluster "
                    f"has {there or 'nothing'}; add nodes, then the same command goes on from the last checkpoint"
                )
        return None

    def fits(self, workers: int, wait_s: float, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Whether so many workers can be placed beside all that runs."""
        selector = self.labels()
        group = placement_group(
            [worker_resources(self._cluster)] * workers,
            strategy=self._cluster.placement,
            bundle_label_selector=[selector] * workers if selector else None,  # type: ignore[arg-type]
        )
        try:
            deadline = time.monotonic() + wait_s
            while not group.wait(min(_SLICE_S, wait_s)):
                if stopped() or time.monotonic() > deadline:
                    return False
            return True
        finally:
            remove_placement_group(group)

    def nodes(self) -> frozenset[str]:
        """Ids of the nodes that live and are not left out."""
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"]) - self.left_out

    def labels(self) -> dict[str, str]:
        """Labels that a worker's node has to have: those of the spec, and not to be left out."""
        left_out = {NODE_LABEL: f"!in({','.join(sorted(self.left_out))})"} if self.left_out else {}
        return {**self._cluster.labels, **left_out}


def worker_resources(cluster: Cluster) -> dict[str, float]:
    """What one training worker reserves."""
    return {"CPU": cluster.cpus_per_worker, **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})}


def _total() -> dict[str, Any]:
    return {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
