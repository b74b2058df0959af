"""Training under torchrun and under Ray is one training: either continues what the other began, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from refinedet.pipeline.drills.bench import SPEC, Bench

from tests.cluster.commands import run_commands

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 64
THREADS = {"OMP_NUM_THREADS": "1"}  # sums are rounded alike


def write_spec(folder: Path, name: str) -> None:
    """A job of 64 steps whose shards all runs share."""
    training = {**SPEC["training"], "epochs": 8, "decay_epochs": [6]}
    data = {**SPEC["data"], "shards": str(folder / "shards")}
    spec = {**SPEC, "name": name, "data": data, "training": training}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(spec))


def start_torchrun(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Two workers on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "-m", "refinedet.pipeline.training", f"{name}.yaml"],
            cwd=folder, stdout=log, stderr=log, env={**os.environ, **THREADS},
        )  # fmt: skip


def steps_of(run: Path) -> list[int]:
    """Steps in the run's records; a line that is being written is not one yet."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and "step" in json.loads(line)]


def test_a_job_that_torchrun_began_and_sigterm_stopped_ends_under_ray_bitwise(bench: Bench, tmp_path: Path) -> None:
    for name in ("whole", "split"):
        write_spec(tmp_path, name)
    whole = start_torchrun(tmp_path, "whole")
    assert whole.wait(300) == 0, (tmp_path / "whole.log").read_text()

    run = tmp_path / "runs" / "split"
    first = start_torchrun(tmp_path, "split")
    deadline = time.monotonic() + 300
    while len(steps_of(run)) < 3:
        assert first.poll() is None, (tmp_path / "split.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "split.log").read_text()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    first.wait(120)  # torchrun's own status is the signal's, whatever its workers did
    last = steps_of(run)[-1]
    assert 3 <= last < STEPS
    assert f"saved at step {last}" in (tmp_path / "split.log").read_text()

    launch = ["launch", "split.yaml", "--address", bench.cluster.address, "--stages", "prepare,train"]
    (done,) = run_commands([launch], cwd=tmp_path, environment={**os.environ, **THREADS})
    assert (done.status, done.stderr) == (0, "")
    assert steps_of(run) == list(range(1, STEPS + 1)), "every step once"
    ours, expected = (
        safetensors.torch.load_file(tmp_path / "runs" / name / "weights.safetensors") for name in ("split", "whole")
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
