"""Two hosts, and one goes away: killed during a save, brought back, and taken away with its cloud's notice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from refinedet.pipeline.drills.bench import SPEC
from refinedet.pipeline.drills.faults import hook
from refinedet.pipeline.runs.settings import FAULT_VARIABLE

from tests.cluster.hosts import Host, RayCluster, reason_against_two_hosts, two_hosts

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
INTERVAL = 4
EPOCHS = 12
STEPS = 8 * EPOCHS
HELD_AT = 3 * INTERVAL
METADATA = "169.254.169.254"
ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 200.0


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    reason = reason_against_two_hosts()
    if reason:
        pytest.skip(reason)
    with two_hosts(head_cpus=1, worker_cpus=2) as cluster:  # Ray places rank 0 where most is left
        yield cluster


class Job:
    """A job that runs on the head of the cluster, and what it leaves in its directory."""

    def __init__(self, cluster: RayCluster, folder: Path, fault: str) -> None:
        training = {**SPEC["training"], "epochs": EPOCHS, "checkpoint_every_steps": INTERVAL}
        elastic = {"workers": {"min": 1, "max": 2}, "placement": "STRICT_SPREAD", "resize_interval_s": 2}
        spec = {**SPEC, "name": "job", "runs": str(folder / "runs"), "training": training, "cluster": elastic}
        (folder / "job.yaml").write_text(yaml.safe_dump(spec))
        self.run = folder / "runs" / "job"
        self.output = folder / "job.out"
        command = [sys.executable, "-m", "refinedet.pipeline.cli", "launch", str(folder / "job.yaml")]
        command += ["--stages", "prepare,train", "--address", cluster.gcs]
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                cluster.head.command(*command),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=cluster.environment | {FAULT_VARIABLE: hook(fault)},
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self._lines("events.jsonl") if line["kind"] == kind]

    def steps(self) -> list[int]:
        return [line["step"] for line in self._lines("metrics.jsonl")]

    def places(self) -> list[dict[str, Any]]:
        """Of every worker that was started, in the order of starts."""
        return [event["facts"] for event in self.events("started")]

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.2)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_job_outlives_the_nodes_it_runs_on(cluster: RayCluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, f"hang:rank=0,step={HELD_AT + 1};slow:rank=0,seconds=0.25")
    try:
        # A checkpoint is written, but not committed, when the host of rank 0 loses power.
        job.wait_for((job.run / "faults" / "hang").exists)
        assert [place["address"] for place in job.places()][:2].count(cluster.worker.address) == 1
        (first,) = (place for place in job.places() if place["rank"] == 0)
        assert first["address"] == cluster.worker.address
        cluster.kill(cluster.worker)

        # The job continues, on the host that is left, from the checkpoint before: an interval back, no more.
        job.wait_for(lambda: job.events("resumed"))
        resumed = job.events("resumed")[0]["step"]
        assert resumed == HELD_AT - INTERVAL, "the last checkpoint that was committed"
        assert not (job.run / "checkpoints" / f"step-{HELD_AT}" / "manifest.json").exists()
        assert job.places()[-1]["address"] == cluster.head.address
        assert len(job.events("restarted")) == 1

        # The host is back: Ray Train continues with both, from the last checkpoint.
        cluster.start(cluster.worker)
        job.wait_for(lambda: len(job.events("resumed")) == 2)
        saved = job.events("resumed")[1]["step"]
        assert {place["address"] for place in job.places()[-2:]} == {cluster.head.address, cluster.worker.address}

        # Its cloud announces that the host will be taken away: the job saves, and continues with the other.
        job.wait_for(lambda: job.steps()[-1] > saved)
        (node,) = (place["node"] for place in job.places()[-2:] if place["address"] == cluster.worker.address)
        with watched(cluster, cluster.worker, node, tmp_path) as (notice, watcher, log):
            notice.touch()
            job.wait_for(lambda: len(job.events("resumed")) == 3)
            assert watcher.wait(_TIMEOUT_S) == 0, log.read_text()
        (leaving,) = job.events("preempted")
        assert leaving["facts"]["nodes"] == [node]
        line = log.read_text().splitlines()[-1]  # before it a server that was not up yet may be named
        assert re.search(r"AWS will terminate this spot instance in 1\d\d s: the node drains", line), line
        assert "a node will be preempted: saving, to resume on the others" in job.output.read_text()
        assert len(job.events("preempted")) == 1
        assert job.places()[-1]["address"] == cluster.head.address
        assert job.process.wait(_TIMEOUT_S) == 0, job.output.read_text()
    finally:
        end(job.process)
    steps = job.steps()
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    crash, grown = (at for at in range(1, len(steps)) if steps[at] <= steps[at - 1])
    assert (steps[crash], steps[grown]) == (resumed + 1, saved + 1), "what came with notice lost no step"
    assert steps[grown - 1] - saved <= INTERVAL + 1, "growing lost at most an interval"
    assert (job.run / "weights.safetensors").exists()
    assert len(job.events("restarted")) == 1, "what comes with notice is no failure"


@contextmanager
def watched(cluster: RayCluster, host: Host, node: str, folder: Path) -> Iterator[tuple[Path, subprocess.Popen, Path]]:
    """The cloud's metadata server and the watcher of `infra/preemption` on a host, at the address that clouds use.

    Yields a file whose creation announces the host's end, the watcher, and its log.
    """
    notice, log = folder / "notice", folder / "watcher.log"
    for command in (
        f"address add {METADATA}/32 dev lo",
        f"route add default via {cluster.head.address}",  # Ray finds its own address by one
    ):
        done = cluster.inside(host, "ip", *command.split())
        assert done.returncode == 0, done.stderr
    # As in the pods: Ray's address and token, and `ray` itself, are in the environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs, "PATH": path}
    server = [sys.executable, "-m", "tests.infra.clouds", "aws", METADATA, "80", str(notice)]
    # Ray finds the node of a machine by files, which these hosts share, so that it is named here.
    watcher = [sys.executable, str(ROOT / "infra" / "preemption" / "drain_on_notice.py"), "--cloud", "aws"]
    watcher += ["--node-id", node]
    with ExitStack() as stack:
        processes = []
        file = stack.enter_context(open(log, "wb"))
        for command in (server, watcher):
            processes.append(
                subprocess.Popen(host.command(*command), env=environment, cwd=ROOT, stdout=file, stderr=file)
            )
            stack.callback(end, processes[-1])
        yield notice, processes[1], log


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
