"""The files that travel with a submitted job, and those that may not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from refinedet.pipeline.cluster import jobs_client
from refinedet.pipeline.cluster.capacity import Node
from refinedet.pipeline.cluster.jobs_client import JobsClient
from refinedet.pipeline.cluster.submission import stage_code
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import parse_spec
from refinedet.pipeline.runs.errors import UserError


def make_spec(**changes) -> JobSpec:
    values = {"name": "job", "runs": "/shared/runs", "data": {"format": "shapes", "train": [{"count": 4}]}}
    return JobSpec.model_validate(values | changes)


def test_the_code_and_the_spec_travel_and_nothing_else(tmp_path: Path) -> None:
    spec = make_spec()
    stage_code(tmp_path, spec)
    assert {path.name for path in tmp_path.iterdir()} == {
        "refinedet",
        "operators",
        "job.yaml",
    }
    assert parse_spec(yaml.safe_load((tmp_path / "job.yaml").read_text()), source="job.yaml") == spec
    assert (tmp_path / "refinedet" / "pipeline" / "report" / "report.html.j2").is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pyc"]
    assert sum(path.stat().st_size for path in files) < 16 * 2**20  # Ray's limit is 512 MiB


@pytest.mark.parametrize("address", ["ray://head:10001", "ftp://head", "http://"])
def test_an_address_that_is_no_dashboard_is_explained(address: str) -> None:
    with pytest.raises(UserError, match="http://HOST:8265"):
        JobsClient(address)


def test_a_full_disk_here_is_not_put_down_to_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(folder: Path, spec: JobSpec) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(jobs_client, "stage_code", fill)
    monkeypatch.setattr(jobs_client, "connect", lambda address: SimpleNamespace(list_jobs=lambda: []))
    monkeypatch.setattr(jobs_client, "cluster_nodes", lambda address: [Node({"CPU": 8.0}, {})])
    with pytest.raises(UserError, match=r"cannot be laid out in .* \(No space left on device\); make room there"):
        JobsClient("http://head:8265").submit(make_spec(runs="s3://bucket/runs"))


def test_code_that_travelled_comes_before_an_installation(tmp_path: Path) -> None:
    """Workers and driver start with the directory on PYTHONPATH, as Ray sets it for a working_dir."""
    stage_code(tmp_path, make_spec())
    program = "import importlib.util as i; print(i.find_spec('refinedet.pipeline').origin)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", program]  # -S: without what is installed for development here
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), done.stderr
    assert any((tmp_path / "operators").iterdir()), "nodes without operators take those that travelled"


def test_an_installation_for_development_is_named(tmp_path: Path) -> None:
    stage_code(tmp_path, make_spec())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-m", "refinedet.pipeline.cluster.entrypoint", python, "launch", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "There is no job spec" in done.stderr and "installation for development" not in done.stderr:
        pytest.skip("the project is not installed for development here")
    assert "comes before the submitted code" in done.stderr
