"""Faults of the data: each is named and counted; past a limit they are an error."""

from __future__ import annotations

import logging
import threading

from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)


class FaultLog:
    """Collects faults of samples and objects; the one past `limit` raises `UserError` and names them.

    The same fault met again, as in the next epoch, counts once.
    """

    def __init__(self, limit: int, what: str, *, silent: bool = False) -> None:
        self.limit = limit
        self.silent = silent
        self.what = what
        self._seen: dict[BadSample, None] = {}
        self._lock = threading.Lock()

    @property
    def faults(self) -> tuple[BadSample, ...]:
        return tuple(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, fault: BadSample) -> None:
        with self._lock:
            if fault in self._seen:
                return
            self._seen[fault] = None
            count = len(self._seen)
        if not self.silent:
            logger.warning("%s: fault %d (of %d tolerated): %s", self.what, count, self.limit, fault)
        if count > self.limit:
            named = "; ".join(str(seen) for seen in list(self._seen)[:5])
            raise UserError(
                f"{self.what}: more than {self.limit} faults, the first: {named}. "
                "Correct the data set, or raise data.max_bad_samples"
            )
