"""The end of a job's MLflow run, by the error that ended the job; without Ray and without a store."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from refinedet.pipeline.cluster.job import Job
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError
from refinedet.pipeline.runs.progress import ProgressDisplay


class Tracker:
    resumed = False

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.description = ""

    def set_description(self, text: str) -> None:
        self.description = text

    def finish(self, status: str, reason: str = "") -> bool:
        self.ended.append(f"{status}: {reason}")
        return True

    def discard(self, reason: str) -> None:
        self.ended.append("discarded")


@pytest.mark.parametrize(
    ("error", "trained", "ended"),
    [
        (UserError("a mistake"), False, "discarded"),
        (UserError("a mistake"), True, "FAILED: UserError: a mistake"),
        (StoppedError("saved at step 3"), True, "KILLED: saved at step 3"),
        (JobError("too many failures"), False, "FAILED: JobError: too many failures"),
    ],
    ids=["mistake", "mistake-later", "stop", "failure"],
)
def test_the_run_ends_as_the_job_did(tmp_path: Path, error: Exception, trained: bool, ended: str) -> None:
    values: dict[str, Any] = {"name": "r", "runs": str(tmp_path), "data": {"format": "shapes", "train": [{"count": 4}]}}
    run = Run(JobSpec.model_validate(values))
    with run.open():
        if trained:
            Path(run.file("metrics.jsonl")).write_text('{"step": 3}\n')
        tracker = Tracker()
        begun: Future[Any] = Future()
        begun.set_result(tracker)
        with Job(run, ProgressDisplay(), threading.Event()) as job:
            job.fail(error)  # where no run has begun, there is none to end
            assert not tracker.ended
            job._begun = begun
            job.fail(error)
    assert tracker.ended == [ended]
    assert Path(run.file("report.html")).exists() == (trained and not isinstance(error, StoppedError))
    if "3" in ended:
        assert "Stopped after 3 steps" in tracker.description
