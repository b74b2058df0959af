"""Whole jobs on a real local Ray: every stage, killed and started again, and the mistakes of users."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.cluster.drill_cases import DRILLS
from pipeline.cluster.drills import SPEC, Bench

pytestmark = pytest.mark.dist

SPARSE_IDS = {1, 3, 7, 20, 90}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("jobs"))
    yield bench
    bench.close()


def refinedet(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's layout whose category ids are sparse, as COCO's are."""
    from pipeline.data.shapes import write_shapes

    folder = tmp_path_factory.mktemp("coco")
    for part, count in (("train", 16), ("val", 6)):
        write_shapes(str(folder / part), count, part=part, image_size=96)
        path = next((folder / part).rglob("*.json"))
        truth = json.loads(path.read_text())
        ids = dict(zip(sorted({category["id"] for category in truth["categories"]}), sorted(SPARSE_IDS), strict=False))
        truth["categories"] = [{**c, "id": ids[c["id"]]} for c in truth["categories"] if c["id"] in ids]
        truth["annotations"] = [
            {**a, "category_id": ids[a["category_id"]]} for a in truth["annotations"] if a["category_id"] in ids
        ]
        (folder / f"{part}.json").write_text(json.dumps(truth))
    return folder


def test_a_job_runs_end_to_end_and_is_not_done_twice(tmp_path: Path, coco: Path) -> None:
    images = {part: str(next((coco / part).rglob("*.jpg")).parent.relative_to(coco)) for part in ("train", "val")}
    spec = {
        "name": "whole",
        "data": {
            "format": "coco",
            "root": str(coco),
            "train": [{"images": images["train"], "annotations": "train.json"}],
            "val": [{"images": images["val"], "annotations": "val.json"}],
            "loader_workers": 0,
        },
        "model": {**SPEC["model"], "num_classes": len(SPARSE_IDS), "theta": 1.0, "score_threshold": 0.0},
        "training": {**SPEC["training"], "epochs": 2, "decay_epochs": [1], "validate_every_epochs": 1},
        "evaluation": {"images_per_piece": 2},
        "multiscale": {"passes": [{"size": 64}, {"size": 128}]},
        "tracking": {"log_every_steps": 1, "report_images": 2},
        "cluster": {"workers": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    done = refinedet("launch", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr.strip(), "libraries must not talk over the progress"

    run = tmp_path / "runs" / "whole"
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) >= {"single", "multiscale"}
    assert set(metrics["single"]["coco"]) >= {"AP", "AP50", "AR100"}
    truth = json.loads((run / "ground_truth.json").read_text())
    for mode in ("single", "multiscale"):
        rows = json.loads((run / "detections" / f"{mode}.json").read_text())
        assert rows
        assert {row["category_id"] for row in rows} <= SPARSE_IDS
        assert {row["image_id"] for row in rows} <= {image["id"] for image in truth["images"]}
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "validation" not in line] == list(range(1, 9))
    page = (run / "report.html").read_text()
    assert "whole" in page
    assert json.loads((run / "tracking.json").read_text())["status"] == "FINISHED"

    weights = (run / "weights.safetensors").stat().st_mtime_ns
    again = refinedet("launch", "job.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3
    assert (run / "weights.safetensors").stat().st_mtime_ns == weights

    predicted = refinedet(
        "predict", str(run), *map(str, sorted((coco / "val").rglob("*.jpg"))[:2]), "--output", "seen", cwd=tmp_path
    )
    assert predicted.returncode == 0, predicted.stderr
    assert len(list((tmp_path / "seen").glob("*.png"))) == 2
    assert len(json.loads((tmp_path / "seen" / "detections.json").read_text())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_passes(bench: Bench, name: str) -> None:
    bench.checks.clear()
    DRILLS[name](bench)
    assert bench.checks
    failed = [
        f"{check.what}: expected {check.expected}, seen {check.seen}" for check in bench.checks if not check.passed
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.input_sise=64"], "did you mean `input_size`?"),
        (["training.global_batch=9"], "cannot be shared by 2 workers"),
        (["data.format=coco", "data.train=[{images: a, annotations: nowhere.json}]", "data.root=."], "nowhere.json"),
        (["data.format=coco", "data.train=[{images: a, annotations: job.yaml}]", "data.root=."], "job.yaml"),
        (["model.num_classes=3"], "set model.num_classes=10"),
        (["cluster.workers=64", "training.global_batch=64"], "64 CPU"),
        (["training.init_weights=nowhere.pth"], "nowhere.pth"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_status_2(
    bench: Bench, tmp_path: Path, changes: list[str], said: str
) -> None:
    spec = yaml.safe_load(bench.write_spec("mistake").read_text()) | {"runs": "runs"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    done = refinedet("launch", "job.yaml", *changes, "--stages", "prepare,train", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("refinedet: ")
    assert said in lines[0]


def test_no_cluster_at_the_address_is_said_at_once(bench: Bench, tmp_path: Path) -> None:
    spec = str(bench.write_spec("nobody"))
    done = refinedet("launch", spec, "--address", "127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Nothing answers at '127.0.0.1:1'" in done.stderr
    done = refinedet("submit", spec, "--address", "http://127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 2
    assert "http://127.0.0.1:1" in done.stderr


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_environment_of_the_tests_does_not_reach_a_cluster() -> None:
    """A RAY_ADDRESS left over in a shell would send every test above to somebody's cluster."""
    assert "RAY_ADDRESS" not in os.environ
