"""A job's timeline, `timeline.jsonl` in the run's directory: submission, starts, stages and the end, over all starts.

One JSON object a line: {"time": seconds since 1970, "edge": "begin" | "end" | "mark", "name": ..., "status": ...}.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import StoppedError
from refinedet.pipeline.runs.lines import read_lines

logger = logging.getLogger(__name__)

TIMELINE_FILE = "timeline.jsonl"


@dataclass(frozen=True)
class Span:
    """A stage, or the waiting between stages. `end` is None while it runs, and where its process was killed.

    status  "done", "failed", "stopped", or "" where its end was not written
    """

    name: str
    begin: float
    end: float | None
    status: str


class Timeline:
    """Writes the timeline of one start; a fault of storage is logged and costs nothing else."""

    def __init__(self, run_dir: str) -> None:
        self._path = storage.join(run_dir, TIMELINE_FILE)
        self._lock = threading.Lock()

    def mark(self, name: str, time_s: float | None = None) -> None:
        """One instant: "submitted", "launched", "ended". `time_s`: seconds since 1970, now by default."""
        self._append({"time": time.time() if time_s is None else time_s, "edge": "mark", "name": name, "status": ""})

    @contextlib.contextmanager
    def launched(self, submitted_at: str | None = None) -> Iterator[None]:
        """Record the block as one start of the job. `submitted_at`: seconds since 1970, of a job that was submitted."""
        if submitted_at:
            self.mark("submitted", float(submitted_at))
        self.mark("launched")
        try:
            yield
        finally:
            self.mark("ended")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the block as the stage `name`, with how it ended."""
        self._append({"time": time.time(), "edge": "begin", "name": name, "status": ""})
        status = "failed"
        try:
            yield
            status = "done"
        except (KeyboardInterrupt, SystemExit, StoppedError):
            status = "stopped"
            raise
        finally:
            self._append({"time": time.time(), "edge": "end", "name": name, "status": status})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            try:
                before = storage.read_bytes(self._path) if storage.exists(self._path) else b""
                storage.write_bytes(self._path, before + json.dumps(line).encode() + b"\n")
            except Exception as error:  # a library of remote storage raises kinds of its own
                logger.warning("%s could not be written: %s", self._path, error)


def read_timeline(run_dir: str) -> tuple[list[Span], list[tuple[str, float]]]:
    """Stages in the order of their beginnings, and marks as (name, time); empty where there is no timeline."""
    path = storage.join(run_dir, TIMELINE_FILE)
    spans: list[Span] = []
    marks: list[tuple[str, float]] = []
    for line in read_lines(path):
        try:
            at, edge, name = float(line["time"]), line["edge"], str(line["name"])
        except (ValueError, KeyError, TypeError):
            continue
        if edge == "mark":
            marks.append((name, at))
        elif edge == "begin":
            spans.append(Span(name, at, None, ""))
        elif spans and spans[-1].name == name and spans[-1].end is None:
            spans[-1] = Span(name, spans[-1].begin, at, str(line.get("status") or ""))
    return spans, marks
