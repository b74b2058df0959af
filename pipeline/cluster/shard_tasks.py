"""Shards written by Ray tasks all over the cluster, one per shard."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from refinedet.pipeline.data.shard_file import ShardWork, WrittenShard, write_shard
from refinedet.pipeline.data.shards import write_in_threads
from refinedet.pipeline.runs.errors import JobError

_FEW = 2
"""shards that this process writes itself, sooner than others start; and least number of tasks in flight"""


def write_in_tasks(works: Sequence[ShardWork], *, max_failures: int) -> Generator[WrittenShard]:
    """Write shards as tasks, and yield each as it is finished; at most one in flight for each CPU of the cluster.

    Reads and writes are retried within a task, by the one policy of storage. A task whose process or node dies is run
    again `max_failures` times, then it is a JobError; what a task raises itself is raised here.
    """
    if len(works) <= _FEW:
        yield from write_in_threads(works)
        return
    write = _write.options(max_retries=max_failures)
    waiting, running = list(reversed(works)), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < max(_FEW, int(ray.cluster_resources().get("CPU", 0))):
                work = waiting.pop()
                running[write.remote(work)] = work.number
            ready, _ = ray.wait(list(running))
            for task in ready:
                number = running.pop(task)
                yield _result(task, number)
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _result(task: Any, number: int) -> WrittenShard:
    try:
        return ray.get(task)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:  # killed, out of memory, or its node is gone
        raise JobError(
            f"shard {number} could not be written: the process that wrote it died again and again "
            f"({type(error).__name__}); see the cluster's logs, then run the same command again to write the rest"
        ) from error


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _write(work: ShardWork) -> WrittenShard:
    return write_shard(work)
