"""A ledger of where a run's time went, kept in its directory across restarts.

Every start writes `goodput/attempt-<n>.json`. What an attempt did after the checkpoint that the next one resumed from
was lost.
"""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from refinedet.pipeline.runs import storage
from refinedet.pipeline.training.records import StepTimes

logger = logging.getLogger(__name__)

_WRITE_EVERY_S = 5.0


@dataclass(frozen=True)
class Goodput:
    """Seconds of the wall clock, from the first start to the last sign of life."""

    useful_s: float
    """computing steps that are part of the result"""
    lost_s: float
    """steps taken after the last commit before a crash, and taken again"""
    restart_s: float
    """from the last sign of life of one attempt to the first step of the next; the first, from the job's beginning"""
    waiting_s: float
    """for data, and for checkpoints and validation"""
    attempts: int


class Ledger:
    """One attempt's page. Rank 0 keeps it; on other ranks it does nothing."""

    def __init__(self, run_dir: str, step: int, active: bool, began_at: float | None = None) -> None:
        self.ended = "failed"
        """how the attempt ended, unless set otherwise"""
        self._active = active
        if not active:
            return
        folder = storage.join(run_dir, "goodput")
        self._path = storage.join(folder, f"attempt-{len(_pages(folder)):04d}.json")
        self._page = {
            "started_at": began_at or time.time(),
            "first_step_at": None,
            "updated_at": time.time(),
            "resumed_step": step,
            "step": step,
            "useful_s": 0.0,
            "waiting_s": 0.0,
            "saves": [],
            "ended": None,
        }
        self._pool = ThreadPoolExecutor(1, "goodput")
        self._writing: Future[None] | None = None
        self._written_at = 0.0

    def begin(self) -> None:
        """The first step begins."""
        if self._active:
            self._page["first_step_at"] = time.time()
            self._write()

    def add(self, step: int, times: StepTimes, saved: bool) -> None:
        """A finished step; `saved` where a checkpoint of it was begun."""
        if not self._active:
            return
        waiting = times.data + times.checkpoint + times.validation
        self._page["waiting_s"] += waiting
        self._page["useful_s"] += times.total - waiting
        self._page["step"] = step
        self._page["updated_at"] = time.time()
        if saved:
            self._page["saves"] = [
                *self._page["saves"][-49:],
                [step, self._page["useful_s"], self._page["waiting_s"]],
            ]
        if saved or time.monotonic() - self._written_at > _WRITE_EVERY_S:
            self._write()

    def close(self) -> None:
        if self._active:
            self._page["ended"] = self.ended
            self._page["updated_at"] = time.time()
            self._pool.shutdown(wait=True)
            _write_page(self._path, self._page)

    def _write(self) -> None:
        if self._writing is None or self._writing.done():
            self._written_at = time.monotonic()
            self._writing = self._pool.submit(_write_page, self._path, dict(self._page))


def read_goodput(run_dir: str) -> Goodput:
    """Add up the attempts of a run."""
    folder = storage.join(run_dir, "goodput")
    pages = [storage.read_json(storage.join(folder, name)) for name in _pages(folder)]
    useful = lost = restart = waiting = 0.0
    for number, page in enumerate(pages):
        before = pages[number - 1]["updated_at"] if number else page["started_at"]
        restart += max(0.0, (page["first_step_at"] or page["updated_at"]) - before)
        kept = (page["useful_s"], page["waiting_s"])
        resumed = pages[number + 1]["resumed_step"] if number + 1 < len(pages) else page["step"]
        if resumed < page["step"]:
            kept = next((save[1:] for save in reversed(page["saves"]) if save[0] <= resumed), (0.0, 0.0))
        useful += kept[0]
        waiting += kept[1]
        lost += page["useful_s"] + page["waiting_s"] - kept[0] - kept[1]
    return Goodput(useful, lost, restart, waiting, len(pages))


def _pages(folder: str) -> list[str]:
    """Names of the whole pages; a process that was killed may have left part of one beside them."""
    return sorted(name for name in storage.list_folder(folder) if re.fullmatch(r"attempt-\d+\.json", name))


def _write_page(path: str, page: dict) -> None:
    try:
        storage.write_json(path, page)
    except Exception as error:  # a library of remote storage raises what it likes
        logger.warning("the goodput ledger could not be written: %s", error)
