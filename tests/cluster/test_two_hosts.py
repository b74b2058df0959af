"""Two hosts, a network between them, and a laptop outside: what a user does all day, on a cluster that loses a node."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import RayCluster, reason_against_two_hosts, two_hosts

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]

QUICKSTART = Path(__file__).resolve().parents[2] / "jobs" / "quickstart.yaml"
EPOCHS, STEPS_AN_EPOCH = 6, 6
STEPS = EPOCHS * STEPS_AN_EPOCH
SMALLER = [
    "data.train=[{count: 96}]",
    "data.val=[{count: 16}]",
    f"training.epochs={EPOCHS}",
    "training.decay_epochs=[4]",
    "training.validate_every_epochs=null",
    "evaluation.images_per_chunk=4",
    "multiscale=null",
    "tracking.log_every_steps=1",
    "cluster.placement=STRICT_SPREAD",  # one worker on each host
    "cluster.stop_grace_s=60",
]
_TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    if reason := reason_against_two_hosts():
        pytest.skip(reason)
    with two_hosts() as cluster:
        yield cluster


def arguments(cluster: RayCluster, folder: Path, name: str) -> list[str]:
    """Of `refinedet submit`: the quickstart, smaller, its runs in a directory that both hosts see."""
    return [str(QUICKSTART), f"name={name}", f"runs={folder}", *SMALLER, "--address", cluster.dashboard]


def lines(run: Path, file: str) -> list[dict]:
    path = run / file
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in lines(run, "metrics.jsonl") if "losses" in line]


def events(run: Path, kind: str) -> list[dict]:
    return [line for line in lines(run, "events.jsonl") if line["kind"] == kind]


def wait_until(condition: Callable[[], object], still: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert still(), f"the job ended first: {said()}"
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


def test_a_job_outlives_a_host(cluster: RayCluster, tmp_path: Path) -> None:
    run = tmp_path / "survivor"
    output = tmp_path / "followed.txt"
    follower = cluster.begin_outside("submit", *arguments(cluster, tmp_path, "survivor"), "--follow", output=output)
    try:
        # In the middle of an epoch, with the one before in a checkpoint.
        wait_until(
            lambda: any(run.glob("checkpoints/*/manifest.json")) and steps(run)[-1] >= STEPS_AN_EPOCH + 2,
            lambda: follower.poll() is None,
            output.read_text,
        )
        cluster.kill(cluster.worker)
        killed_at = steps(run)[-1]
        wait_until(lambda: events(run, "waiting"), lambda: follower.poll() is None, output.read_text)
        cluster.start(cluster.worker)
        assert follower.wait(_TIMEOUT_S) == 0, output.read_text()
    finally:
        follower.kill()
    said = output.read_text()
    assert f"{STEPS} steps" in said, said
    assert "AP50" in said, said
    assert set(steps(run)) == set(range(1, STEPS + 1))
    resumed = [event["step"] for event in events(run, "resumed")]
    assert len(resumed) == 1
    assert killed_at - STEPS_AN_EPOCH <= resumed[0] <= killed_at
    assert (run / "weights.safetensors").is_file()
    assert json.loads((run / "metrics.json").read_text())["single"]
    assert cluster.token not in said


def test_a_job_that_is_stopped_goes_on_with_no_step_lost(cluster: RayCluster, tmp_path: Path) -> None:
    run = tmp_path / "second"
    epochs = 3 * EPOCHS  # long enough for two commands before it ends
    spec = [*arguments(cluster, tmp_path, "second"), f"training.epochs={epochs}"]
    submitted = cluster.outside("submit", *spec)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        return cluster.outside(*command, "--address", cluster.dashboard)

    wait_until(
        lambda: (steps(run) or [0])[-1] >= STEPS_AN_EPOCH + 2, lambda: True, lambda: ask("logs", "second").stdout
    )
    again = cluster.outside("submit", *spec)
    assert again.returncode == 2
    assert f"is in use by job {job}" in again.stderr
    stopped = ask("stop", "second")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped" in stopped.stdout
    last = steps(run)[-1]
    assert last < epochs * STEPS_AN_EPOCH, "it ended before it was stopped"
    assert json.loads((run / "tracking.json").read_text())["status"] == "KILLED"

    other = cluster.outside("submit", *spec, "training.learning_rate=0.5")
    assert other.returncode == 2
    assert "training.learning_rate was 0.02, now 0.5" in other.stderr

    resumed = ask("resume", "second")
    assert resumed.returncode == 0, resumed.stderr
    followed = ask("logs", "second", "--follow")
    assert followed.returncode == 0, followed.stdout
    assert [event["step"] for event in events(run, "resumed")] == [last]
    assert steps(run) == list(range(1, epochs * STEPS_AN_EPOCH + 1))
    assert ask("list").stdout.count("second-") == 2
