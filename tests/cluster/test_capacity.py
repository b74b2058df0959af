"""The capacity of a cluster for a job: answers worked out by hand, and by trying every way to place the workers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refinedet.pipeline.cluster.capacity import AUTOSCALING, Node, check_capacity, gpus_of
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import UserError


def node(cpus: float, gpus: float = 0, **labels: str) -> Node:
    return Node({"CPU": cpus, "GPU": gpus}, labels)


@pytest.mark.parametrize(
    ("cluster", "nodes", "said"),
    [
        ({"workers": 4}, [node(2)], "4 workers with 1 CPU each need 4 CPU, and there are 2 in the cluster"),
        ({"workers": 2, "gpus_per_worker": 1}, [node(8)], "need 2 GPU, and there are 0 in the cluster"),
        ({"workers": 3, "gpus_per_worker": 1}, [node(8, 1), node(8, 1)], "need 3 GPU, and there are 2 in the cluster"),
        ({"workers": {"min": 3, "max": 9}}, [node(2)], "3 workers"),
        ({"workers": 1, "labels": {"zone": "a"}}, [node(2, zone="b")], "zone=a, and none of the 1 nodes has them"),
        ({"workers": 3, "labels": {"zone": "a"}}, [node(2, zone="a"), node(9)], "2 in the nodes with zone=a"),
        ({"workers": 2, "cpus_per_worker": 2}, [node(3), node(1)], "do not fit: the nodes hold 1, 0 of them"),
        ({"workers": 4, "placement": "STRICT_PACK"}, [node(3), node(3)], "on one node, the largest holds 3"),
        ({"workers": 3, "placement": "STRICT_SPREAD"}, [node(9), node(9)], "wants 3 nodes that hold a worker"),
    ],
)
def test_what_does_not_fit_is_named(cluster: dict, nodes: list[Node], said: str) -> None:
    with pytest.raises(UserError) as refused:
        check_capacity(Cluster(**cluster), nodes)
    assert said in str(refused.value)


def test_a_cluster_that_grows_is_waited_for() -> None:
    head = Node({AUTOSCALING: 1.0}, {})
    check_capacity(Cluster(workers=16, gpus_per_worker=1), [head])


def test_labels_with_operators_are_left_to_ray() -> None:
    check_capacity(Cluster(workers=2, labels={"zone": "!a", "kind": "in(x,y)"}), [node(2)])


def test_gpus_are_counted_by_kind() -> None:
    kind = {"ray.io/accelerator-type": "H200"}
    nodes = [node(8, 8, **kind), node(8, 8, **kind), node(4, 1), node(2, 0, **{"ray.io/accelerator-type": "A100"})]
    assert gpus_of(nodes) == ["1 x GPU", "16 x H200"]
    assert gpus_of([node(2)]) == []


@given(
    cpus=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    workers=st.integers(1, 4),
    each=st.integers(1, 3),
    placement=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)
def test_a_job_is_refused_exactly_where_no_placement_exists(
    cpus: list[int], workers: int, each: int, placement: str
) -> None:
    def fits(homes: tuple[int, ...]) -> bool:
        used = [homes.count(index) * each for index in range(len(cpus))]
        if any(use > have for use, have in zip(used, cpus, strict=True)):
            return False
        different = len(set(homes))
        return {"STRICT_PACK": different == 1, "STRICT_SPREAD": different == workers}.get(placement, True)

    possible = any(fits(homes) for homes in itertools.product(range(len(cpus)), repeat=workers))
    cluster = Cluster(workers=workers, cpus_per_worker=each, placement=placement)  # type: ignore[arg-type]
    if possible:
        check_capacity(cluster, [node(count) for count in cpus])
    else:
        with pytest.raises(UserError):
            check_capacity(cluster, [node(count) for count in cpus])
