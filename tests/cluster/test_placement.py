"""Eight simulated nodes: where Ray puts the work of a job, asked for as the stages ask for it.

A head that only drives, three nodes with CPUs, four with two GPUs each (which Ray only counts), two of these in each of
two zones. Nothing is trained: the places are reserved, and their nodes are read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

import pytest

# Slow: test_capacity.py holds the same rules without starting Ray.
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(400)]

CPU_NODES = {"cpu-0", "cpu-1", "cpu-2"}
GPU_NODES = {"gpu-0": "a", "gpu-1": "a", "gpu-2": "b", "gpu-3": "b"}

PROGRAM = """
import json, sys
import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util.placement_group import placement_group_table

head = {"num_cpus": 0, "node_name": "head", "no_monitor": True, "include_log_monitor": False}
nodes = Nodes(initialize_head=True, head_node_args=head)
for name in ("cpu-0", "cpu-1", "cpu-2"):
    nodes.add_node(num_cpus=4, node_name=name)
for name, zone in json.loads(sys.argv[1]).items():
    nodes.add_node(num_cpus=8, num_gpus=2, node_name=name, labels={"zone": zone})

from refinedet.pipeline.cluster import placement, preparation_stage
from refinedet.pipeline.cluster.capacity import check_capacity, nodes_of
from refinedet.pipeline.cluster.session import NAMESPACE
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.config.spec import Cluster

ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False)
names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
seen = {"nodes": sorted(names.values())}

def places(**section):
    # The group of places that training reserves, kept until its nodes are read.
    kept = []
    remove, placement.remove_placement_group = placement.remove_placement_group, kept.append
    try:
        found = placement.Placement(Cluster(**section))
        fits = found.fits(section["workers"], 6.0)
    finally:
        placement.remove_placement_group = remove
    homes = placement_group_table(kept[0])["bundles_to_node_id"].values() if fits else []
    remove(kept[0])
    return sorted(names[home] for home in homes)

gpu = {"gpus_per_worker": 1, "cpus_per_worker": 1}
seen["pack"] = places(workers=2, placement="PACK", **gpu)
seen["strict_pack"] = places(workers=2, placement="STRICT_PACK", **gpu)
seen["strict_pack_too_many"] = places(workers=3, placement="STRICT_PACK", **gpu)
seen["spread"] = places(workers=4, placement="SPREAD", **gpu)
seen["strict_spread"] = places(workers=4, placement="STRICT_SPREAD", **gpu)
seen["zone_b"] = places(workers=4, placement="PACK", labels={"zone": "b"}, **gpu)
seen["all"] = places(workers=8, placement="PACK", **gpu)

@ray.remote
def where():
    import time
    time.sleep(1.0)
    return ray.get_runtime_context().get_node_id()

prepare = where.options(num_cpus=preparation_stage.CPUS)
seen["prepare"] = sorted(names[home] for home in ray.get([prepare.remote() for _ in range(6)]))

refused = []
for section in ({"workers": 9, **gpu}, {"workers": 5, "placement": "STRICT_SPREAD", **gpu}):
    try:
        check_capacity(Cluster(**section), nodes_of(ray.nodes(), alive="Alive", resources="Resources", labels="Labels"))
    except UserError as error:
        refused.append(str(error))
seen["refused"] = refused
print(json.dumps(seen))
ray.shutdown()
nodes.shutdown()
"""


@pytest.fixture(scope="module")
def seen() -> Iterator[dict]:
    folder = tempfile.mkdtemp(prefix="rd-", dir="/tmp")  # short: names of sockets are limited to 107 bytes
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_TMPDIR": folder,
    }
    command = [sys.executable, "-c", PROGRAM, json.dumps(GPU_NODES)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_there_are_eight_nodes(seen: dict) -> None:
    assert seen["nodes"] == sorted({"head", *CPU_NODES, *GPU_NODES})


def test_pack_fills_a_node_before_the_next(seen: dict) -> None:
    assert len(set(seen["pack"])) == 1
    assert set(Counter(seen["all"]).values()) == {2}


def test_strict_pack_is_one_node_or_nothing(seen: dict) -> None:
    assert len(seen["strict_pack"]) == 2
    assert len(set(seen["strict_pack"])) == 1
    assert seen["strict_pack_too_many"] == []


def test_spread_takes_every_node_once(seen: dict) -> None:
    assert seen["spread"] == sorted(GPU_NODES)
    assert seen["strict_spread"] == sorted(GPU_NODES)


def test_labels_choose_the_nodes(seen: dict) -> None:
    assert seen["zone_b"] == ["gpu-2", "gpu-2", "gpu-3", "gpu-3"]


def test_training_is_on_gpu_nodes_and_shards_are_written_on_the_others(seen: dict) -> None:
    assert set(seen["all"]) == set(GPU_NODES)
    assert set(seen["prepare"]) <= CPU_NODES


def test_what_no_node_can_hold_is_refused(seen: dict) -> None:
    assert len(seen["refused"]) == 2
    assert "need 9 GPU, and there are 8 in the cluster" in seen["refused"][0]
    assert "wants 5 nodes that hold a worker with 1 CPU and 1 GPU, there are 4" in seen["refused"][1]
