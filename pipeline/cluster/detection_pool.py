"""Workers that a job keeps between its stages of detection: to load torch and the model takes them many seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray


class DetectionPool:
    """Idle workers, all made for one run. As a context manager it ends those that are left."""

    def __init__(self) -> None:
        self._idle: list[Any] = []

    def __enter__(self) -> DetectionPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self) -> Any | None:
        """A worker, perhaps one that has died meanwhile; None where another has to be made."""
        return self._idle.pop() if self._idle else None

    def keep(self, workers: Iterable[Any]) -> None:
        self._idle.extend(workers)

    def close(self) -> None:
        while self._idle:
            ray.kill(self._idle.pop())
