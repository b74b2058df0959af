"""The end of a command: a status, and one sentence for whoever ran them."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError, describe_end


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UserError("no\n such   thing"), 2, "no such thing"),
        (StoppedError("saved at step 3"), 130, "stopped: saved at step 3"),
        (JobError("training failed"), 1, "training failed"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/r/spec.yaml"), 1, "no space is left for /runs/r/spec"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "no space is left (Disk quota exceeded); free some"),
    ],
)
def test_an_end_that_is_no_defect_is_one_sentence(error: Exception, status: int, sentence: str) -> None:
    end = describe_end(error)
    assert end is not None
    assert end.status == status
    assert end.sentence.startswith(sentence)


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EPERM, "not permitted"), AssertionError()])
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    assert describe_end(error) is None


def test_a_full_disk_ends_a_command_with_a_sentence(tmp_path: Path) -> None:
    """/dev/full is a disk on which nothing has room."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, which this system does not have")
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    image, category = {"id": 1, "width": 9, "height": 9}, {"id": 1, "name": "a"}
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}
    annotation = box | {"id": 1, "area": 16, "iscrowd": 0}
    truth.write_text(json.dumps({"images": [image], "categories": [category], "annotations": [annotation]}))
    found.write_text(json.dumps([box | {"score": 0.5}]))
    command = [sys.executable, "-m", "refinedet.pipeline.cli", "evaluate", "--detections", str(found)]
    command += ["--annotations", str(truth), "--json", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("refinedet: no space is left")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError])
def test_a_path_that_cannot_be_used_is_the_users_to_fix(kind: type[OSError]) -> None:
    end = describe_end(kind(0, "is not what it should be", "/data/x"))
    assert end is not None
    assert end.status == 2
    assert end.sentence.startswith("/data/x: is not what it should be; ")
    assert describe_end(kind("without a file")) is None
