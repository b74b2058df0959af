"""A job whose MLflow server is killed for 30 s, and whose driver is killed and started again: every point once."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator

import pytest
from refinedet.pipeline.drills.bench import STEPS, Bench

from tests.mlflow_server import MlflowServer

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "outage"
OUTAGE_S = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def test_an_outage_and_a_killed_driver_leave_every_point_once(bench: Bench, server: MlflowServer) -> None:
    spec = bench.write_spec(NAME, tracking={"log_every_steps": 1, "uri": server.uri})
    slow = "slow:rank=0,seconds=2"
    job = bench.launch(spec, fault=slow)
    assert bench.wait_for(job, lambda: len(bench.steps(NAME)) >= 4), job.text
    server.kill()
    began = len(bench.steps(NAME))
    time.sleep(OUTAGE_S)
    ended = len(bench.steps(NAME))
    server.start()
    assert ended > began, "training continued"
    assert bench.wait_for(job, lambda: bench.commits(NAME) and len(bench.steps(NAME)) >= ended + 3), job.text
    lines = [json.loads(line) for line in (bench.run(NAME) / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["times"]["total"] for line in lines]
    away, there = statistics.median(seconds[began:ended]), statistics.median(seconds[1:began] + seconds[ended:])
    sys.stderr.write(f"\nmedian step {there:.3f} s with the server, {away:.3f} s without, {ended - began} steps\n")

    job.kill()
    again = bench.launch(spec)
    assert again.wait() == 0, again.text

    runs = server.rows("SELECT run_uuid, status FROM runs WHERE name = 'outage'")
    assert [status for _, status in runs] == ["FINISHED"]
    (run, _), *_ = runs
    points = server.rows(f"SELECT step FROM metrics WHERE run_uuid = '{run}' AND key = 'loss/total' ORDER BY step")
    steps = [step for (step,) in points]
    assert sorted(set(steps)) == list(range(1, STEPS + 1)), "no point is missing"
    assert steps == sorted(set(steps)), "no point occurs twice"
