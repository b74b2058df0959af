"""Files of one JSON object per line, which grow while a job runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from refinedet.pipeline.runs import storage

logger = logging.getLogger(__name__)

_UPLOAD_INTERVAL_S = 60.0


def read_lines(path: str) -> list[dict[str, Any]]:
    """Objects of a file of lines, without those that a crash cut short; empty where the file does not exist."""
    lines = []
    for text in storage.read_bytes(path).splitlines() if storage.exists(path) else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines


class LinesLog:
    """One JSON object a line, appended as training goes; where the run is behind a URI, uploaded now and then.

    While storage is away or full, lines wait: training continues, and every line is written later.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._local = storage.is_local(self._target)
        if self._local:
            path = self._target
        else:
            handle, path = tempfile.mkstemp(suffix=".jsonl")
            os.close(handle)
            if storage.exists(self._target):
                with open(path, "wb") as file:
                    file.write(storage.read_bytes(self._target))
        self._path, self._uploaded = path, time.monotonic()
        self._waiting = b""
        self._failing = False

    def append(self, line: dict[str, Any], *, upload: bool = False) -> None:
        """Write a line. `upload`: at once, also where the file is behind a URI."""
        self._waiting += json.dumps(line).encode() + b"\n"
        self._try(self._write)
        if not self._local and (upload or time.monotonic() - self._uploaded > _UPLOAD_INTERVAL_S):
            self._try(self._upload)

    def close(self) -> None:
        self._try(self._write)
        if not self._local:
            self._try(self._upload)
            os.unlink(self._path)

    def _write(self) -> None:
        if not self._waiting:
            return
        with open(self._path, "ab", buffering=0) as file:  # opened each time: a handle may outlive what it stands for
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        with open(self._path, "rb") as file:
            storage.write_bytes(self._target, file.read())

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
            self._failing = False
        except Exception as error:  # a library of remote storage raises what it likes
            if not self._failing:
                logger.warning("%s cannot be written now, its lines wait: %s", self._target, error)
            self._failing = True
