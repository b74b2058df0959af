"""The prepare stage: Ray tasks turn the data set into shards, where the cluster sees the data.

A task for each part reads and checks the annotations. It has every shard written by a task of its own, on any node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from refinedet.pipeline.cluster.mailbox import Mailbox, MailboxLink
from refinedet.pipeline.cluster.shard_tasks import write_in_tasks
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_files import parse_spec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError

_POLL_S = 0.3
_PROGRESS_INTERVAL_S = 0.5


def run_preparation(
    run: Run,
    parts: Sequence[str],
    *,
    mailbox: Mailbox,
    on_progress: Callable[[int, int], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Write the shards of `parts`, beside one another, or find them written; returns digest and num_samples of each.

    Raises UserError for faults of the data set, StoppedError after a stop, JobError where no CPU came free within
    `cluster.resource_timeout_s`.
    """
    spec = run.spec_for_workers()
    prepare = _prepare.options(max_retries=run.spec.cluster.max_failures)
    tasks = {prepare.remote(spec, part, mailbox.actor): part for part in parts}
    waiting = list(tasks)
    progress: dict[str, tuple[int, int]] = {}
    found: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_POLL_S)
            progress |= dict(message for _, message in mailbox.take(stop=stop_requested()))
            if total := sum(total for _, total in progress.values()):
                on_progress(sum(done for done, _ in progress.values()), total)
            for task in ready:
                found[tasks[task]] = _result(task, tasks[task])
            if stop_requested():
                raise StoppedError("while the shards were written; run the same command again to write the rest")
            waited_s = time.monotonic() - began
            if not progress and not found and waited_s > run.spec.cluster.resource_timeout_s:
                raise JobError(
                    f"no CPU came free to write shards within {waited_s:.0f} s, the cluster has "
                    f"{ray.cluster_resources().get('CPU', 0):g}; wait for other jobs, or add nodes"
                )
    finally:
        for task in waiting:
            ray.cancel(task, force=True, recursive=False)  # the tasks that it submitted end with it
    return {part: found[part] for part in parts}


def _result(task: ray.ObjectRef, part: str) -> dict[str, Any]:
    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | JobError):
            raise type(error.cause)(str(error.cause)) from None
        if isinstance(error.cause, OSError):  # a full disk, storage that does not answer
            raise JobError(
                f"shards could not be written: {error.cause}; fix it, then run the same command again to write the rest"
            ) from error
        raise
    except RayError as error:  # killed, out of memory, or its node is gone
        raise JobError(
            f"the shards of {part} could not be written: the process that wrote them died again and again "
            f"({type(error).__name__}); see the cluster's logs, then run the same command again to write the rest"
        ) from error


@ray.remote(num_cpus=1)  # released while it waits for the tasks that write its shards
def _prepare(spec: dict[str, Any], part: str, mailbox: Any) -> dict[str, Any]:
    link = MailboxLink(mailbox, rank=0)
    link.push((part, (0, 0)))
    from refinedet.pipeline.data.reading import write_coco_annotations
    from refinedet.pipeline.data.shards import prepare_shards

    run = Run(parse_spec(spec, source="the job's spec"))
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_INTERVAL_S or done == total:
            link.push((part, (done, total)))
            last = time.monotonic()

    shards = prepare_shards(
        run.spec.data,
        part,
        storage.join(run.shards, part),
        write_all=partial(write_in_tasks, max_failures=run.spec.cluster.max_failures),
        on_progress=report,
    )
    write_coco_annotations(shards, run.ground_truth(part))
    return {"digest": shards.digest, "num_samples": shards.num_samples}
