"""`refinedet sweep`, started for real: stopped, resumed, one run broken."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

JOB = {
    "name": "small",
    "data": {
        "format": "shapes",
        "image_size": 96,
        "train": [{"count": 64}],
        "val": [{"count": 8}],
        "loader_workers": 0,
    },
    "model": {
        "num_classes": 10,
        "input_size": 128,
        "backbone": "regnetx_002",
        "tcb_channels": 16,
        "prediction_block": False,
    },
    "training": {"global_batch": 4, "epochs": 4, "decay_epochs": [], "learning_rate": 0.001, "warmup_epochs": 0},
    "tracking": {"log_every_steps": 1},
    "cluster": {"workers": 1},
}


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "refinedet.pipeline.cli", "sweep", "sweep.yaml", *overrides],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_sweep_is_stopped_and_resumed_and_goes_on_past_a_broken_run(tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    variants = {
        "full": {},
        "broken": {"data": {"val": [{"count": 8, "root": "absent", "format": "coco", "images": "i",
                                     "annotations": "a.json"}], "shards": "other"}},
        "vanilla": {"model": {"head": "vanilla"}},
    }  # fmt: skip
    sweep = {"name": "s", "job": "job.yaml", "seeds": [0], "variants": variants,
             "compare": [{"better": "full", "worse": "vanilla"}]}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    runs = tmp_path / "runs" / "s"

    process = start(tmp_path)
    deadline = time.monotonic() + 600
    while not (runs / "full-0" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "run the same command again to resume" in said
    assert list((runs / "full-0" / "checkpoints").glob("*")), said

    process = start(tmp_path)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 1, said
    assert "1 of 3 runs failed (broken-0)" in said
    assert "undecided (one seed)" in said
    steps = [line for line in (runs / "full-0" / "metrics.jsonl").read_text().splitlines() if '"losses"' in line]
    assert len(steps) == 64

    variants.pop("broken")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    process = start(tmp_path)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "2 runs in" in said
    assert "2 done before" in said
