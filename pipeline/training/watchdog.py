"""A step that does not end: which rank holds up the others, and where its code stands.

Every rank has a thread that watches the step's clock. After `stall_timeout_s` without a finished step each writes a
report beside the run; whoever does not write one is frozen or dead, and of those who do, the ones that wait in a
collective are held up by the ones that do not.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import FrameType

from refinedet.pipeline.runs import storage
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.world import World

logger = logging.getLogger(__name__)

EXIT_STALLED = 75
"""Exit status of a worker that a stall ended: it may be tried again"""
_READERS = 32
"""reports that rank 0 reads at once"""


@dataclass(frozen=True)
class StallReport:
    """State of one rank when a step had taken too long."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    seconds: float
    """since the last step was finished"""
    waiting: bool
    """in a collective, for other ranks"""
    stack: str


@dataclass(frozen=True)
class StallVerdict:
    """Ranks that held up a step. `ranks` is empty where every rank waits for the others: the network, or the device."""

    step: int
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    reason: str
    reports: tuple[StallReport, ...]

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.ranks))}" if self.ranks else "no single rank"
        return f"stalled after step {self.step}: {who} {self.reason}"


def judge_stall(reports: Sequence[StallReport], hosts: Sequence[str]) -> StallVerdict:
    """Name the ranks that hold up the rest.

    reports  of the ranks that could still write one; at least one
    hosts    of all ranks, by rank
    """
    step = min(report.step for report in reports)
    silent = sorted(set(range(len(hosts))) - {report.rank for report in reports})
    busy = [report for report in reports if not report.waiting]
    if silent:
        ranks, reason = silent, "gave no sign of life: the process is frozen, dead, or cut off from storage"
    elif busy:
        ranks = [report.rank for report in busy]
        reason = "; ".join(f"on {r.host}, pid {r.pid}, in {r.phase} for {r.seconds:.0f} s:\n{r.stack}" for r in busy)
    else:
        ranks, reason = [], "is behind: all wait in a collective, so the network or a device does not answer"
    return StallVerdict(step, tuple(ranks), tuple(hosts[rank] for rank in ranks), reason, tuple(reports))


def exit_process(verdict: StallVerdict) -> None:
    """End this process at once, since no exception reaches a thread that waits in a collective."""
    logging.shutdown()
    os._exit(EXIT_STALLED)


class Watchdog:
    """Watches from construction (a collective) to `close`. The thread that makes it is the one whose stack is reported.

    on_stall  called from the watching thread, once, on every rank that can
    """

    def __init__(
        self,
        run_dir: str,
        world: World,
        clock: StepClock,
        timeout_s: float,
        on_stall: Callable[[StallVerdict], None] = exit_process,
    ) -> None:
        attempt, folder = world.broadcast_object((time.time_ns(), storage.join(run_dir, "stalls")))
        self._folder = storage.join(folder, str(attempt))
        self.hosts = world.all_gather_object(socket.gethostname())
        self._world = world
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_stall = on_stall
        self._watched = threading.get_ident()
        self._step, self._since = 0, time.monotonic()
        self._paused = False
        self._allowed_s = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """A step is over, or something else that may take its time."""
        self._step, self._since, self._paused, self._allowed_s = step, time.monotonic(), False, 0.0

    def pause(self) -> None:
        """Mark the time until the next `finished` as no step."""
        self._paused = True

    def allow(self, seconds: float) -> None:
        """Allow more time than a step has until the next `finished`, for work with a limit of its own."""
        self._allowed_s = seconds

    @property
    def _limit_s(self) -> float:
        return self._timeout_s + self._allowed_s

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        period_s = min(5.0, self._timeout_s / 10)
        while not self._closed.wait(period_s):
            if not self._paused and time.monotonic() - self._since > self._limit_s:
                verdict = self._report()
                if verdict and not self._closed.is_set():
                    logger.critical("%s", verdict)
                    self._closed.wait(2 * period_s)  # so that the others reach their verdict before any rank ends
                    self._on_stall(verdict)
                    return

    def _report(self) -> StallVerdict | None:
        frame = sys._current_frames().get(self._watched)
        mine = StallReport(
            rank=self._world.rank,
            host=self.hosts[self._world.rank],
            pid=os.getpid(),
            step=self._step,
            phase=self._clock.phase,
            seconds=time.monotonic() - self._since,
            waiting=_waits(self._clock.phase, frame),
            stack="".join(traceback.format_stack(frame)[-12:]) if frame else "",
        )
        logger.error("no step finished for %.0f s, in %s:\n%s", mine.seconds, mine.phase, mine.stack)
        report = storage.join(self._folder, f"rank-{mine.rank}.json")
        _try("a report of a stall", lambda: storage.write_json(report, asdict(mine)))
        # The others started to wait when this rank did, or somewhat later; they look as often as this one.
        self._closed.wait(min(15.0, self._timeout_s / 2))
        if self._since > time.monotonic() - self._limit_s:
            _try("the report of a slow step", lambda: storage.remove(report))  # or it would speak for the next stall
            return None  # it continued after all
        return self._judge(mine)

    def _judge(self, mine: StallReport) -> StallVerdict:
        """Rank 0 reads all reports and writes the verdict, which the others read: one read a rank, not one a pair."""
        found = storage.join(self._folder, "verdict.json")
        if self._world.is_main:
            with ThreadPoolExecutor(_READERS, "stall-reports") as pool:
                read = list(pool.map(self._read_report, range(1, self._world.size)))
            verdict = judge_stall([mine, *(report for report in read if report)], self.hosts)
            _try("a verdict", lambda: storage.write_json(found, asdict(verdict)))
            return verdict
        ends = time.monotonic() + min(30.0, self._timeout_s)
        while time.monotonic() < ends and not self._closed.wait(min(1.0, self._timeout_s / 20)):
            with suppress(Exception):  # missing so far, or storage is away
                written = storage.read_json(found)
                ranks, hosts = tuple(written["ranks"]), tuple(written["hosts"])
                return StallVerdict(written["step"], ranks, hosts, written["reason"], (mine,))
        reason = "gave no verdict: the process is frozen, dead, or cut off from storage"
        return StallVerdict(mine.step, (0,), (self.hosts[0],), reason, (mine,))

    def _read_report(self, rank: int) -> StallReport | None:
        with suppress(Exception):  # missing, or storage is away
            return StallReport(**storage.read_json(storage.join(self._folder, f"rank-{rank}.json")))
        return None


def _try(what: str, action: Callable[[], object]) -> None:
    """Report and end a stall also where storage is away, which may well be its cause."""
    try:
        action()
    except Exception as error:
        logger.warning("%s could not be kept: %s", what, error)


def _waits(phase: str, frame: FrameType | None) -> bool:
    """Return whether the code waits for other ranks: in torch.distributed, or for the device after a collective."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(("distributed_c10d.py", "training/exchange.py")):
            return True
        frame = frame.f_back
    return phase in ("reduce", "backward", "optimizer")  # gradients are reduced in backward, weights gathered after
