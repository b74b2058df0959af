"""Jobs on a real head node with token authentication: submitted, followed, watched, stopped, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from refinedet.pipeline.cluster.dashboard import HEADERS
from refinedet.pipeline.cluster.jobs_client import JobsClient
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import dump_spec
from refinedet.pipeline.drills.faults import hook
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.settings import FAULT_VARIABLE

from tests.cluster.hosts import RayCluster, one_host

pytestmark = pytest.mark.dist

EPOCHS, STEPS = 5, 40
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
SPEC = {
    "data": {"format": "shapes", "image_size": 96, "train": [{"count": 32}], "val": [], "loader_workers": 0},
    "model": {
        "num_classes": 10,
        "input_size": 64,
        "backbone": "resnet10t",
        "tcb_channels": 16,
        "prediction_block": False,
    },
    "training": {
        "global_batch": 4,
        "reference_batch": 4,
        "epochs": EPOCHS,
        "decay_epochs": [4],
        "learning_rate": 0.002,
        "warmup_learning_rate": 0.0005,
        "precision": "fp32",
    },
    "tracking": {"log_every_steps": 1},
    "cluster": {"workers": 1},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    # Every pass takes a while longer, so that there is a middle to stop in.
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET, FAULT_VARIABLE: hook("slow:rank=0,seconds=0.2")}
    with one_host(num_cpus=2, environment=environment) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> JobsClient:
    """In this process, whatever Ray has already read from its environment: the token goes in a header."""
    monkeypatch.setenv(HEADERS, json.dumps({"Authorization": f"Bearer {cluster.token}"}))
    return JobsClient(cluster.dashboard)


def spec_of(folder: Path, name: str, **cluster: object) -> JobSpec:
    values = {"name": name, "runs": str(folder), **SPEC, "cluster": {**SPEC["cluster"], **cluster}}
    return JobSpec.model_validate(values)


def lines(run: Path, file: str) -> list[dict]:
    path = run / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(run: Path) -> list[int]:
    return [line["step"] for line in lines(run, "metrics.jsonl") if "losses" in line]


def metrics_of(cluster: RayCluster) -> str:
    """The targets of Prometheus: all that the dashboard's service discovery names."""

    def fetch(url: str) -> str:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {cluster.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    targets = json.loads(fetch(f"{cluster.dashboard}/api/prometheus/sd"))
    return "".join(fetch(f"http://{target}/metrics") for group in targets for target in group["targets"])


@pytest.mark.slow
def test_a_job_is_followed_stopped_and_resumed(cluster: RayCluster, client: JobsClient, tmp_path: Path) -> None:
    run = tmp_path / "live"
    (tmp_path / "live.yaml").write_text(dump_spec(spec_of(tmp_path, "live")))
    output = tmp_path / "followed.txt"
    command = ("submit", str(tmp_path / "live.yaml"), "--address", cluster.dashboard, "--follow")
    follower = cluster.begin_outside(*command, output=output)
    try:
        deadline = time.monotonic() + 200
        while len(steps(run)) < 12:
            assert follower.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        seen = metrics_of(cluster)
        first = client.find("live")
        assert first.status == "RUNNING"
        with pytest.raises(UserError, match=f"is in use by job {first.id}"):
            client.submit(spec_of(tmp_path, "live"))
        assert client.stop("live").status == "STOPPED"
        assert follower.wait(60) == 1
    finally:
        follower.kill()
    assert "stopping: saving first" in output.read_text()
    assert f"job {first.id} stopped" in output.read_text()
    last = steps(run)[-1]
    assert last < STEPS
    assert json.loads((run / "tracking.json").read_text())["status"] == "KILLED"

    # Prometheus has seen the run.
    found = re.search(r'ray_refinedet_step\{[^}]*run="live"[^}]*\} ([\d.]+)', seen)
    assert found, "no gauge of the run among the node's metrics"
    assert 0 < float(found.group(1)) <= last
    assert re.search(rf'ray_refinedet_total_steps\{{[^}}]*run="live"[^}}]*\}} {STEPS}', seen)

    other = spec_of(tmp_path, "live")
    other = other.model_copy(update={"training": other.training.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"training\.learning_rate was [\d.]+, now 0\.5"):
        client.submit(other)

    second = client.resume("live")
    assert "".join(client.follow_logs(second)).count(f"{STEPS} steps")
    assert client.find("live").status == "SUCCEEDED"
    assert [job.id for job in client.list() if job.run == "live"] == [first.id, second]
    assert [event["step"] for event in lines(run, "events.jsonl") if event["kind"] == "resumed"] == [last]
    assert steps(run) == list(range(1, STEPS + 1)), "a step was lost, or taken twice"
    assert all(line["total_steps"] == STEPS for line in lines(run, "metrics.jsonl") if "losses" in line)
    check_nothing_secret(cluster, client, tmp_path)


@pytest.mark.slow
def test_a_job_that_fails_says_why_through_its_log(cluster: RayCluster, client: JobsClient, tmp_path: Path) -> None:
    """Its shards are written on the cluster; then it turns out that the model has other classes than they have."""
    spec = spec_of(tmp_path, "wrong")
    spec = spec.model_copy(update={"model": dataclasses.replace(spec.model, num_classes=3)})
    (tmp_path / "wrong.yaml").write_text(dump_spec(spec))
    followed = cluster.outside("submit", str(tmp_path / "wrong.yaml"), "--address", cluster.dashboard, "--follow")
    assert followed.returncode == 1
    job = followed.stdout.split()[0]
    assert "✓ prepare    32 train images" in followed.stdout
    assert "refinedet: model.num_classes is 3, but the data set has 10 categories; set" in followed.stdout
    assert re.fullmatch(rf"refinedet: job {job} failed: .*exit code 2\n", followed.stderr)
    assert "Traceback" not in followed.stdout
    found = client.find("wrong")
    assert (found.id, found.status, found.home) == (job, "FAILED", f"{tmp_path}/wrong")
    assert client.read_logs("wrong") in followed.stdout
    listed = cluster.outside("list", "--address", cluster.dashboard)
    assert re.search(rf"^{job} +failed .*\d+ s$", listed.stdout, re.MULTILINE)
    told = cluster.outside("status", "wrong", "--address", cluster.dashboard)
    assert told.stdout.startswith(f"{job}  failed  run wrong at {tmp_path}/wrong\n")
    check_nothing_secret(cluster, client, tmp_path)


def check_nothing_secret(cluster: RayCluster, client: JobsClient, folder: Path) -> None:
    """Neither the cluster's token nor its storage key is in what a job leaves, or in what Ray prints of it."""
    session = cluster.folder / "head" / "session_latest" / "logs"
    left = [path for root in (folder, session) for path in root.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in left)
    assert any("job-driver" in path.name for path in left)
    told = repr(client._client.list_jobs()).encode()
    for word in (SECRET.encode(), cluster.token.encode()):
        assert word not in told
        assert [str(path) for path in left if word in path.read_bytes()] == []


def test_a_wrong_token_is_refused_in_one_sentence(cluster: RayCluster) -> None:
    refused = cluster.outside("list", "--address", cluster.dashboard, token="wrong")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert re.fullmatch(r"refinedet: The cluster at \S+ refused the authentication token; .+\n", refused.stderr)


@pytest.mark.parametrize(
    ("cluster_section", "said"),
    [
        ({"gpus_per_worker": 1}, "1 workers with 1 GPU each need 1 GPU, and there are 0 in the cluster"),
        ({"workers": 4}, "4 workers with 1 CPU each need 4 CPU, and there are 2 in the cluster"),
        ({"labels": {"zone": "a"}}, "none of the 1 nodes has them"),
        ({"workers": 2, "placement": "STRICT_SPREAD"}, "wants 2 nodes that hold a worker with 1 CPU, there are 1"),
    ],
)
def test_what_the_cluster_cannot_hold_is_refused_at_once(
    client: JobsClient, tmp_path: Path, cluster_section: dict, said: str
) -> None:
    jobs = len(client.list())
    with pytest.raises(UserError) as refused:
        client.submit(spec_of(tmp_path, "too-large", **cluster_section))
    assert said in str(refused.value)
    assert len(client.list()) == jobs


def test_a_job_that_is_not_there_is_named_with_those_that_are(client: JobsClient) -> None:
    with pytest.raises(UserError, match="has no job 'unknown'; its runs: "):
        client.find("unknown")
