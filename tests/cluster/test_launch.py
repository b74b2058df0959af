"""Whole jobs on a real local Ray: every stage, stopped and started again, and the mistakes of users."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.drills.bench import SPEC, Bench
from refinedet.pipeline.drills.faults import hook
from refinedet.pipeline.runs.settings import FAULT_VARIABLE

from tests.cluster.commands import Done, run_commands
from tests.data.shape_files import write_shapes

pytestmark = pytest.mark.dist

SPARSE_IDS = {1, 3, 7, 20, 90}
STEPS = 8


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's layout whose category ids are sparse, as COCO's are."""
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


@pytest.mark.timeout(600)  # three launches, of which each waits a minute for its workers
def test_a_job_is_stopped_goes_on_to_the_end_and_is_not_done_twice(bench: Bench, tmp_path: Path, coco: Path) -> None:
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
        "evaluation": {"images_per_chunk": 3},
        "multiscale": {"passes": [{"size": 64}]},
        "tracking": {"log_every_steps": 1, "report_images": 2},
        "cluster": {"workers": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec))
    run = tmp_path / "runs" / "whole"

    # SIGTERM to the whole process group in the middle of training, as `timeout` and Slurm send it, on the Ray that the
    # command started itself.
    command = [sys.executable, "-m", "refinedet.pipeline.cli", "launch", "job.yaml"]
    slow = {**os.environ, FAULT_VARIABLE: hook("slow:rank=0,seconds=0.5")}
    with open(tmp_path / "first.out", "wb") as out, open(tmp_path / "first.err", "wb") as err:
        first = subprocess.Popen(command, cwd=tmp_path, env=slow, stdout=out, stderr=err, start_new_session=True)
    deadline = time.monotonic() + 200
    while not read_lines(run / "metrics.jsonl"):
        assert first.poll() is None, (tmp_path / "first.err").read_text()
        assert time.monotonic() < deadline, (tmp_path / "first.out").read_text()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(100) == 130, (tmp_path / "first.err").read_text()
    last = steps_of(run)[-1]
    assert last < STEPS
    assert (tmp_path / "first.err").read_text() == (
        f"refinedet: stopped: saved at step {last}; run the same command again to resume\n"
    ), "libraries must not talk over the progress"
    stopped = json.loads((run / "tracking.json").read_text())
    assert stopped["status"] == "KILLED"

    # The same command on a cluster, again with a change that trains nothing, and the detector it left, on pictures.
    pictures = sorted((coco / "val").rglob("*.jpg"))[:2]
    launch = ["launch", "job.yaml", "--address", bench.cluster.address]
    done, again, predicted = run_commands(
        [launch, [*launch, "training.keep_last=7"], ["predict", run, *pictures, "--output", "seen"]], cwd=tmp_path
    )
    for each in (done, again, predicted):
        assert (each.status, each.stderr) == (0, ""), each
    assert steps_of(run) == list(range(1, STEPS + 1)), "every step once"
    finished = json.loads((run / "tracking.json").read_text())
    assert (finished["status"], finished["run_id"]) == ("FINISHED", stopped["run_id"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) >= {"single", "multiscale"}
    assert set(metrics["single"]["coco"]) >= {"AP", "AP50", "AR100"}
    truth = json.loads((run / "ground_truth.json").read_text())
    for mode in ("single", "multiscale"):
        rows = json.loads((run / "detections" / f"{mode}.json").read_text())
        assert rows
        assert {row["category_id"] for row in rows} <= SPARSE_IDS
        assert {row["image_id"] for row in rows} <= {image["id"] for image in truth["images"]}
    assert "whole" in (run / "report.html").read_text()
    assert again.stdout.count("done before") == 3
    assert len(list((tmp_path / "seen").glob("*.jpg"))) == 2
    assert len((tmp_path / "seen" / "detections.jsonl").read_text().splitlines()) == 2


MISTAKES = [
    (["model.input_sise=64"], "did you mean `input_size`?"),
    (["training.global_batch=1", "training.micro_batch=null"], "global_batch 1 has fewer images than the 2 workers"),
    (["data.format=coco", "data.train=[{images: a, annotations: nowhere.json}]", "data.root=."], "nowhere.json"),
    (["data.format=coco", "data.train=[{images: a, annotations: job.yaml}]", "data.root=."], "job.yaml"),
    (["model.num_classes=3"], "set model.num_classes=10"),
    (["cluster.workers=64", "training.global_batch=64", "training.micro_batch=null"], "64 CPU"),
    (["training.init_weights=nowhere.pth"], "nowhere.pth"),
    (["training.init_weights=timm", "model.backbone=resnext152_32x4d"], "timm has no trained weights"),
    (
        ["cluster.workers={min: 5, max: 7}", "training.global_batch=4"],
        "fewer images than the 7 workers",
    ),
    (
        [
            "data.format=coco",
            "data.root=swapped",
            "data.train=[{images: train, annotations: annotations/instances_train.json}]",
            "data.val=[{images: val, annotations: annotations/instances_val.json}]",
        ],
        "label 1 (the categories by ascending id) is 'disc' in the first and 'square' in the second",
    ),
]
SAID = [
    *(said for _, said in MISTAKES),
    "the preflight found 1 fault; nothing was started",
    "Nothing answers at '127.0.0.1:1'",
    "http://127.0.0.1:1",
]


@pytest.fixture(scope="module")
def mistakes(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The outcome of every mistake, by words of its message."""
    folder = tmp_path_factory.mktemp("mistakes")
    spec = yaml.safe_load(bench.write_spec("mistake").read_text()) | {"runs": "runs"}
    del spec["data"]["shards"]
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    write_swapped(folder / "swapped")
    launch = ["launch", "job.yaml", "--stages", "prepare,train", "--address", bench.cluster.address]
    commands = [[*launch, f"name=mistake{number}", *changes] for number, (changes, _) in enumerate(MISTAKES)]
    commands.append([*launch, "--preflight", f"data.shards={damaged_shards(spec, folder)}"])
    nobody = [["launch", "job.yaml", "--address", "127.0.0.1:1"]]
    nobody += [["submit", "job.yaml", "runs=/shared/runs", "--address", "http://127.0.0.1:1"]]
    return dict(zip(SAID, run_commands(commands + nobody, cwd=folder), strict=True))


def write_swapped(folder: Path) -> None:
    """A data set in COCO's layout whose validation part has two categories the other way round."""
    for part in ("train", "val"):
        write_shapes(str(folder), 8, part=part, image_size=96)
    path = folder / "annotations" / "instances_val.json"
    truth = json.loads(path.read_text())
    first, second, *_ = truth["categories"]
    first["name"], second["name"] = second["name"], first["name"]
    path.write_text(json.dumps(truth))


def damaged_shards(spec: dict, folder: Path) -> Path:
    """Shards of which a bit is not what it was."""
    prepare_shards(JobSpec.model_validate(spec).data, "train", str(folder / "damaged" / "train"))
    shard = next((folder / "damaged" / "train").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return folder / "damaged"


@pytest.mark.parametrize("said", SAID)
def test_a_mistake_ends_with_one_sentence_and_status_2(mistakes: dict[str, Done], said: str) -> None:
    done = mistakes[said]
    assert done.status == 2, done
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("refinedet: ")
    assert said in lines[0]


def test_a_preflight_prints_every_finding(mistakes: dict[str, Done]) -> None:
    seen = mistakes["the preflight found 1 fault; nothing was started"].stdout
    assert "✗ shards" in seen
    assert seen.count("does not match its digest; remove it and run `refinedet shard`") == 1, "by its reader"
    for line in ("workers     2 on 1 node", "storage     ", "memory      about", "versions    python", "clocks      "):
        assert f"✓ {line}" in seen
    assert "GB/s: 32 MiB across 2 workers" in seen


@pytest.mark.slow
def test_a_preflight_in_order_ends_well_and_keeps_nothing(bench: Bench, tmp_path: Path) -> None:
    command = ["launch", bench.write_spec("checked"), "runs=runs", "data.shards=nowhere", "--preflight"]
    (done,) = run_commands([[*command, "--address", bench.cluster.address]], cwd=tmp_path)
    assert (done.status, done.stderr) == (0, "")
    assert "✓ shards      not written yet" in done.stdout
    assert [path.name for path in (tmp_path / "runs" / "checked").iterdir()] == ["logs"]


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if "validation" not in line]


def test_the_environment_of_the_tests_does_not_reach_a_cluster() -> None:
    """A RAY_ADDRESS left over in a shell would send every test above to somebody's cluster."""
    assert "RAY_ADDRESS" not in os.environ
