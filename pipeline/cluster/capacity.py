"""Check of a job's resources against the nodes of a cluster, before anything waits for resources that never come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import UserError

AUTOSCALING = "refinedet_autoscaling"
"""resource of the head of a cluster that adds nodes by itself: there, what is missing may still come"""


@dataclass(frozen=True)
class Node:
    """A node that is alive: its resources in all, used or not, and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def slots(self, cluster: Cluster) -> int:
        """Workers that it can hold."""
        fits = [
            int(self.resources.get(name, 0.0) / each + 1e-6)
            for name, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
            if each
        ]
        return min(fits)


def gpus_of(nodes: Iterable[Node]) -> list[str]:
    """The GPUs of a cluster by their kind, as Ray reports it: ["16 x H200"]."""
    counts: Counter[str] = Counter()
    for node in nodes:
        counts[node.labels.get("ray.io/accelerator-type", "GPU")] += round(node.resources.get("GPU", 0.0))
    return [f"{count} x {kind}" for kind, count in sorted(counts.items()) if count]


def check_capacity(cluster: Cluster, nodes: Sequence[Node]) -> None:
    """Refuse a job that the cluster cannot hold; Ray would wait for ever.

    Raises UserError with the sentence of `missing_capacity`.
    """
    missing = missing_capacity(cluster, nodes)
    if missing:
        raise UserError(f"{missing}; lower cluster.workers or the resources of each worker, or add nodes.")


def missing_capacity(cluster: Cluster, nodes: Sequence[Node]) -> str | None:
    """Return why the nodes cannot hold the least number of workers: the resource, and how much there is; else None.

    None too for a cluster that scales itself up (`ray up`, KubeRay): missing nodes may still come.
    """
    if any(node.resources.get(AUTOSCALING) for node in nodes):
        return None
    workers = cluster.min_workers
    fitting = [node for node in nodes if _has_labels(node, cluster.labels)]
    where = "the cluster"
    if cluster.labels:
        wanted = _shown(cluster.labels)
        if not fitting:
            there = {f"{key}={value}" for node in nodes for key, value in node.labels.items() if "ray.io/" not in key}
            return (
                f"cluster.labels requires nodes with {wanted}, and none of the {len(nodes)} nodes has them (their "
                f"labels: {', '.join(sorted(there)) or 'none'})"
            )
        where = f"the nodes with {wanted}"
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        needed = workers * each
        available = sum(node.resources.get(resource, 0.0) for node in fitting)
        if needed > available + 1e-6:
            return (
                f"{workers} workers with {each:g} {resource} each need {needed:g} {resource}, and there are "
                f"{available:g} in {where}"
            )
    return _missing_places(cluster, workers, sorted((node.slots(cluster) for node in fitting), reverse=True))


def _missing_places(cluster: Cluster, workers: int, slots: Sequence[int]) -> str | None:
    """`slots`: workers that each node can hold, most first."""
    each = f"{cluster.cpus_per_worker:g} CPU" + (
        f" and {cluster.gpus_per_worker:g} GPU" * bool(cluster.gpus_per_worker)
    )
    nodes = sum(count > 0 for count in slots)
    if cluster.placement == "STRICT_PACK" and slots[0] < workers:
        return (
            f"cluster.placement STRICT_PACK wants {workers} workers with {each} each on one node, the largest holds "
            f"{slots[0]}"
        )
    if cluster.placement == "STRICT_SPREAD" and nodes < workers:
        return (
            f"cluster.placement STRICT_SPREAD wants {workers} nodes that hold a worker with {each}, there are {nodes}"
        )
    if sum(slots) < workers:
        return f"{workers} workers with {each} each do not fit: the nodes hold {', '.join(map(str, slots))} of them"
    return None


def _has_labels(node: Node, labels: Mapping[str, str]) -> bool:
    """Compare labels; Ray's own operators (!value, in(...)) are left to Ray."""
    return all(value.startswith(("!", "in(")) or node.labels.get(key) == value for key, value in labels.items())


def _shown(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
