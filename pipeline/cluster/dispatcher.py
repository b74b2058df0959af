"""Dispatcher of chunks to Ray actors: every chunk is answered once, whatever happens to workers and storage.

A worker that dies, answers no ping, or exceeds a chunk's deadline is replaced, and its chunk goes to another. A chunk
that fails otherwise is tried again after a growing pause. A worker that waits for storage keeps its chunk, and its
deadline stands still.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from refinedet.pipeline.evaluation.chunks import Chunk
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError

POLL_S = 0.5
PING_EVERY_S, PING_LIMIT_S = 10.0, 60.0
DEADLINE_FLOOR_S, FIRST_DEADLINE_S = 60.0, 3600.0
"""least time for a chunk; and time for a chunk while none is done, so that nothing is known"""
DEADLINE_FACTOR = 5.0
PAUSE_S = 5.0
"""before a chunk that failed is tried again; doubled each time"""


@dataclass
class _Worker:
    """An actor with the methods `work(chunk)` and `ping()`, and what it is to answer; no chunk: that it has started.

    `ping` answers with what the worker waits for, as `storage.describe_waiting`; "" where it works.
    """

    number: int
    actor: Any
    answer: ray.ObjectRef
    chunk: Chunk | None = None
    since: float = field(default_factory=time.monotonic)
    ping: ray.ObjectRef | None = None
    pinged: float = field(default_factory=time.monotonic)
    rests_until: float = 0.0
    waits: bool = False
    """for storage"""


class Dispatcher:
    """Workers of one stage.

    start      start worker `number`: returns the actor, and the answer that comes once it is ready
    report     one line for the terminal
    resource_timeout_s  longest time without any worker that has started
    """

    def __init__(
        self,
        start: Callable[[int], tuple[Any, ray.ObjectRef]],
        *,
        workers: int,
        max_failures: int,
        resource_timeout_s: float,
        stop: threading.Event,
        report: Callable[[str], None],
    ) -> None:
        self._start, self._report, self._stop = start, report, stop
        self._max_failures, self._resource_timeout_s = max_failures, resource_timeout_s
        self._busy = [self._started(number) for number in range(workers)]
        self.idle: list[_Worker] = []
        self._tries: Counter[str] = Counter()
        self._seconds_per_image: list[float] = []

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Any]]:
        """Yield (chunk, answer) as chunks are done. Raises StoppedError, UserError, or JobError once a chunk or the
        start of a worker has failed more often than `max_failures`."""
        self._waiting = [(0.0, chunk) for chunk in chunks]
        left, seen = len(chunks), time.monotonic()
        try:
            while left:
                self._hand_out()
                for worker, answer in self._answers():
                    if worker.chunk is not None:
                        seconds = (time.monotonic() - worker.since) / len(worker.chunk.positions)
                        self._seconds_per_image.append(seconds)
                        left -= 1
                        yield worker.chunk, answer
                if self._stop.is_set():
                    raise StoppedError(f"{left} of {len(chunks)} chunks are left; run the same command again to resume")
                self._replace_silent()
                if self.idle or any(worker.chunk for worker in self._busy):
                    seen = time.monotonic()
                elif time.monotonic() - seen > self._resource_timeout_s:
                    raise JobError(
                        f"no evaluation worker started within cluster.resource_timeout_s {self._resource_timeout_s:g} s"
                    )
        finally:
            for worker in self._busy:
                ray.kill(worker.actor)

    def _started(self, number: int) -> _Worker:
        return _Worker(number, *self._start(number))

    def _hand_out(self) -> None:
        now = time.monotonic()
        ready = [entry for entry in self._waiting if entry[0] <= now]
        rested = [worker for worker in self.idle if worker.rests_until <= now]
        for entry, worker in zip(ready, rested, strict=False):
            self._waiting.remove(entry)
            self.idle.remove(worker)
            self._busy.append(_Worker(worker.number, worker.actor, worker.actor.work.remote(entry[1]), entry[1]))

    def _answers(self) -> Iterator[tuple[_Worker, Any]]:
        if not self._busy:
            time.sleep(POLL_S)
            return
        by_answer = {worker.answer: worker for worker in self._busy}
        ready, _ = ray.wait(list(by_answer), timeout=POLL_S)
        for worker in (by_answer[each] for each in ready):
            self._busy.remove(worker)
            try:
                answer = ray.get(worker.answer)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    self._busy.append(worker)  # ended with the others
                    raise UserError(str(error.cause)) from None
                self._fail(worker, f"failed ({type(error.cause).__name__}: {error.cause})", alive=True)
            except RayError as error:  # its process died: killed, out of memory, or its node is gone
                self._fail(worker, f"died ({type(error).__name__})", alive=False)
            else:
                self.idle.append(worker)
                yield worker, answer

    def _replace_silent(self) -> None:
        """Replace workers that exceed their deadline, or that have answered no ping for long."""
        now = time.monotonic()
        for worker in [worker for worker in self._busy if worker.chunk is not None]:
            assert worker.chunk is not None
            if now - worker.since > self._deadline_s(worker.chunk):
                self._fail(worker, f"exceeded its deadline of {self._deadline_s(worker.chunk):.0f} s", alive=False)
            elif worker.ping is None:
                if now - worker.pinged > PING_EVERY_S:
                    worker.ping, worker.pinged = worker.actor.ping.remote(), now
            elif (waiting := _answer_of(worker.ping)) is not None:
                self._note_waiting(worker, waiting, now)
            elif now - worker.pinged > PING_LIMIT_S:
                self._fail(worker, f"is frozen: no answer for {PING_LIMIT_S:.0f} s", alive=False)

    def _note_waiting(self, worker: _Worker, waiting: str, now: float) -> None:
        """Take a worker's answer to a ping; of an outage that several workers meet, one line is printed."""
        if waiting and not any(other.waits for other in self._busy):
            self._report(f"evaluation worker {worker.number} waits for storage: {waiting}")
        worker.ping, worker.pinged, worker.waits = None, now, bool(waiting)
        if waiting:
            worker.since = now

    def _deadline_s(self, chunk: Chunk) -> float:
        if not self._seconds_per_image:
            return FIRST_DEADLINE_S
        usual_s = statistics.median(self._seconds_per_image) * len(chunk.positions)
        return max(DEADLINE_FLOOR_S, DEADLINE_FACTOR * usual_s)

    def _fail(self, worker: _Worker, why: str, *, alive: bool) -> None:
        """Put a worker's chunk back, replace the worker unless it is alive; JobError past the allowed failures."""
        what = worker.chunk.name if worker.chunk else f"the start of worker {worker.number}"
        self._tries[what] += 1
        tries = self._tries[what]
        if worker in self._busy:
            self._busy.remove(worker)
        if tries > self._max_failures:
            ray.kill(worker.actor)
            raise JobError(f"{what} failed {tries} times; the last time its worker {why}")
        self._report(
            f"evaluation worker {worker.number} {why}; {what} is tried again ({tries} of {self._max_failures})"
        )
        resumed_at = time.monotonic() + alive * PAUSE_S * 2 ** (tries - 1)
        if worker.chunk is not None:
            self._waiting.insert(0, (resumed_at, worker.chunk))
        if alive and worker.chunk is not None:
            worker.rests_until = resumed_at  # where storage is away, it would fail every other chunk too
            self.idle.append(worker)
        else:
            ray.kill(worker.actor)
            self._busy.append(self._started(worker.number))


def _answer_of(ping: ray.ObjectRef) -> str | None:
    """Return what the worker waits for, or ""; None while there is no answer."""
    try:
        return ray.get(ping, timeout=0)
    except GetTimeoutError:
        return None
    except RayError:  # the answer to its chunk carries the reason
        return ""
