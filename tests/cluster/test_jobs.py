"""What travels with a submitted job, and what may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.cluster.jobs import JobsClient
from pipeline.cluster.submission import check_spec, stage_code
from pipeline.errors import UserError
from pipeline.spec import JobSpec
from pipeline.spec_files import parse_spec


def make_spec(**changes) -> JobSpec:
    values = {"name": "job", "runs": "/shared/runs", "data": {"format": "shapes", "train": [{"count": 4}]}}
    return JobSpec.model_validate(values | changes)


def test_the_code_and_the_spec_travel_and_nothing_else(tmp_path: Path) -> None:
    spec = make_spec()
    stage_code(tmp_path, spec)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model",
        "pipeline",
        "operators",
        "sitecustomize.py",
        "job.yaml",
    }
    assert parse_spec(yaml.safe_load((tmp_path / "job.yaml").read_text()), source="job.yaml") == spec
    assert (tmp_path / "pipeline" / "tracking" / "report.html.j2").is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pyc"]
    assert sum(path.stat().st_size for path in files) < 16 * 2**20  # Ray's limit is 512 MiB


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"runs": "runs"}, "runs"),
        ({"data": {"format": "coco", "root": "datasets/coco", "train": []}}, "data.root"),
        ({"data": {"format": "shapes", "shards": "shards", "train": [{"count": 4}]}}, "data.shards"),
        ({"training": {"init_weights": "w.pth"}}, "training.init_weights"),
    ],
)
def test_a_relative_path_means_nothing_on_a_cluster(changes: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_spec(make_spec(**changes))


def test_uris_and_absolute_paths_are_taken() -> None:
    check_spec(make_spec(runs="s3://bucket/runs", data={"format": "coco", "root": "/data/coco", "train": []}))


@pytest.mark.parametrize("address", ["ray://head:10001", "ftp://head", "http://"])
def test_an_address_that_is_no_dashboard_is_explained(address: str) -> None:
    with pytest.raises(UserError, match="http://HOST:8265"):
        JobsClient(address)
