"""The prepare stage: a Ray task turns the data set into shards, where the cluster sees the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from pipeline import storage
from pipeline.cluster.monitor import Monitor, MonitorClient
from pipeline.cluster.run import Run
from pipeline.errors import UserError
from pipeline.spec_files import parse_spec

_POLL_S = 0.3
_PROGRESS_INTERVAL_S = 0.5


def run_preparation(
    run: Run, parts: Sequence[str], *, on_progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """Write the shards of `parts`, or find them written; returns digest and num_samples of each part."""
    monitor = Monitor(f"{run.path}:prepare")
    found = {}
    try:
        for part in parts:
            task = _prepare.remote(run.spec.model_dump(mode="json"), part, monitor.name)
            while not ray.wait([task], timeout=_POLL_S)[0]:
                for _, _, (done, total) in monitor.drain():
                    on_progress(done, total)
            try:
                found[part] = ray.get(task)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from None
                raise
    finally:
        monitor.close()
    return found


@ray.remote(num_cpus=1, max_retries=2)
def _prepare(spec: dict[str, Any], part: str, monitor_name: str) -> dict[str, Any]:
    from pipeline.data import prepare_shards, write_coco_annotations

    run = Run(parse_spec(spec, source="the job's spec"))
    monitor = MonitorClient(monitor_name, rank=0)
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_INTERVAL_S or done == total:
            monitor.push("progress", (done, total))
            last = time.monotonic()

    shards = prepare_shards(run.spec.data, part, storage.join(run.shards, part), on_progress=tell)
    if not storage.exists(run.ground_truth(part)):
        write_coco_annotations(shards, run.ground_truth(part))
    return {"digest": shards.digest, "num_samples": shards.num_samples}
