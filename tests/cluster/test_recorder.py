"""MLflow's record of the steps of a run whose driver was killed before it had delivered them."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from refinedet.pipeline.cluster.recorder import TrainingRecorder
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec, Tracking
from refinedet.pipeline.tracking.runs import RunTracker


def line(step: int) -> dict[str, Any]:
    numbers = {"epoch": 0, "learning_rate": 0.1, "gradient_norm": 1.0, "images_per_s": 9.0, "memory_bytes": 2**30}
    return {"step": step, "losses": {"total": 1.0 / step}, "shares": {}, "times": {}, "time": 1000.0 + step, **numbers}


class Record:
    """A record of training at a step, which may be taken again with another value."""

    total_steps, epoch, learning_rate, images_per_s, losses = 9, 0, 0.1, 9.0, {"total": 0.5}

    def __init__(self, step: int) -> None:
        self.step = step

    def line(self) -> dict[str, Any]:
        return {**line(self.step), "losses": self.losses, "time": 2000.0 + self.step}


def test_what_a_killed_driver_had_not_delivered_is_delivered_and_no_step_twice(tmp_path: Path) -> None:
    data = {"format": "shapes", "train": [{"count": 4}]}
    spec = JobSpec.model_validate(
        {"name": "r", "runs": str(tmp_path), "data": data, "tracking": {"log_every_steps": 1}}
    )
    run = Run(spec)

    def tracker() -> RunTracker:
        return RunTracker(Tracking(), name="r", run_dir=run.path, runs=str(tmp_path))

    with tracker() as first:
        for step in (1, 2):
            first.log_metrics(step, {"loss/total": 1.0 / step}, time_s=1000.0 + step)
    Path(run.file("metrics.jsonl")).write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 6)))
    with tracker() as second:
        assert second.resumed
        begun: Future[RunTracker] = Future()
        begun.set_result(second)
        recorder = TrainingRecorder.__new__(TrainingRecorder)
        recorder._begun, recorder._run, recorder._logged = begun, run, None
        recorder._logged = recorder._deliver_earlier()
        for step in (4, 5, 6, 6):
            recorder._log(cast(Any, Record(step)).line())
        assert second.flush()
        history = second.client.get_metric_history(second.run_id, "loss/total")
    assert sorted((point.step, point.value) for point in history) == [
        *((step, 1.0 / step) for step in range(1, 6)),
        (6, 0.5),
    ]
