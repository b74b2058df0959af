"""Deliveries to a tracking server, made beside training and retried while the server is away.

A delivery is a function without arguments that raises where it fails. Metric points are gathered into batches on the
way. Order is kept; nothing here ever raises into the caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_FLUSH_PAUSE_S = 2.0
_MAX_FAULTS = 3


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time_ms` is milliseconds since 1970."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class _Call:
    what: str
    deliver: Callable[[], object]


class Outbox:
    """A queue with one thread that delivers.

    send_points      delivers one batch of at most `batch_points`; must be safe to repeat
    is_away          whether an error means that the server is away: tried until it is back. Any other error is the
                     delivery's own fault, and it is dropped, with a warning, after three attempts
    max_points       held while the server is away; beyond it the oldest are dropped, with one warning
    max_pause_s      longest pause between two attempts
    linger_s         maximum delay before a partial batch is sent
    """

    def __init__(
        self,
        send_points: Callable[[list[Point]], object],
        *,
        is_away: Callable[[Exception], bool] = lambda error: True,
        batch_points: int = 500,
        max_points: int = 200_000,
        max_pause_s: float = 60.0,
        linger_s: float = 2.0,
    ) -> None:
        self._send_points = send_points
        self._is_away = is_away
        self._batch_points = batch_points
        self._max_points = max_points
        self._max_pause_s = max_pause_s
        self._linger_s = linger_s
        self._queue: deque[Point | _Call] = deque()
        self._num_points = 0
        self._changed = threading.Condition()
        self._busy = False
        self._hurry = False
        self._closing = False
        self._last_success = time.monotonic()
        self._said_away = self._said_full = False
        self.num_lost = 0
        """points and calls dropped for good"""
        self._thread = threading.Thread(target=self._run, name="tracking-outbox", daemon=True)
        self._thread.start()

    def put_points(self, points: list[Point]) -> None:
        with self._changed:
            self._queue.extend(points)
            self._num_points += len(points)
            while self._num_points > self._max_points:
                self._drop_oldest_point()
            self._changed.notify_all()

    def put_call(self, what: str, deliver: Callable[[], object]) -> None:
        """Queue a delivery; `what` names it in the log, as in "tags"."""
        with self._changed:
            self._queue.append(_Call(what, deliver))
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is delivered; give up, False, after `timeout_s` without a single success."""
        with self._changed:
            self._hurry = True
            self._last_success = time.monotonic()
            self._changed.notify_all()
            while self._queue or self._busy:
                left = self._last_success + timeout_s - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(left, 0.5))
            self._hurry = False
            return not (self._queue or self._busy)

    def close(self, timeout_s: float) -> bool:
        """Flush, then end the thread; False where anything was ever lost. Warn about what could not be delivered."""
        delivered = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            if not delivered:
                calls = ", ".join(item.what for item in self._queue if isinstance(item, _Call))
                self.num_lost += self._num_points
                logger.warning(
                    "The tracking server did not come back: %d metric values%s were not delivered; the run directory "
                    "has them.",
                    self._num_points,
                    f" and {calls}" if calls else "",
                )
                self._queue.clear()
                self._num_points = 0
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        return delivered and not self.num_lost

    def _drop_oldest_point(self) -> None:
        for index, item in enumerate(self._queue):
            if isinstance(item, Point):
                del self._queue[index]
                break
        self._num_points -= 1
        if not self._said_full:
            self._said_full = True
            logger.warning(
                "The tracking server is away and %d metric values are waiting: from now on the oldest are dropped. "
                "The run's directory keeps them all.",
                self._max_points,
            )
        self.num_lost += 1

    def _take(self) -> list[Point] | _Call | None:
        """The next delivery, still at the head of the queue; None when closing. Called with the lock held."""
        due: float | None = None
        while not self._closing:
            if self._queue and isinstance(self._queue[0], _Call):
                return self._queue[0]
            batch: list[Point] = []
            for item in self._queue:
                if not isinstance(item, Point) or len(batch) == self._batch_points:
                    break
                batch.append(item)
            if not batch:
                self._changed.wait()
                continue
            now = time.monotonic()
            due = due or now + self._linger_s
            complete = len(batch) == self._batch_points or len(batch) < len(self._queue)
            if complete or self._hurry or now >= due:
                return batch
            self._changed.wait(due - now)
        return None

    def _run(self) -> None:
        pause_s, num_faults = 0.5, 0
        while True:
            with self._changed:
                delivery = self._take()
                if delivery is None:
                    return
                self._busy = True
            error = self._attempt(delivery)
            with self._changed:
                self._busy = False
                away = error is not None and self._is_away(error)
                num_faults = num_faults + 1 if error is not None and not away else 0
                if error is None or num_faults == _MAX_FAULTS:
                    self._remove(delivery)
                    self._last_success = time.monotonic()
                if num_faults == _MAX_FAULTS:
                    self._drop(delivery, error)
                self._say_whether(away)
                self._changed.notify_all()
                if error is None or num_faults == _MAX_FAULTS:
                    pause_s, num_faults = 0.5, 0
                else:
                    self._pause(pause_s)
                    pause_s = min(2 * pause_s, self._max_pause_s)

    def _drop(self, delivery: list[Point] | _Call, error: Exception | None) -> None:
        if isinstance(delivery, _Call):
            self.num_lost += 1
            logger.warning("%s could not be delivered to the tracking server: %s", delivery.what, error)
            return
        self.num_lost += len(delivery)
        logger.warning("%d metric values could not be delivered to the tracking server: %s", len(delivery), error)

    def _say_whether(self, away: bool) -> None:
        if away and not self._said_away:
            logger.warning("The tracking server does not answer; the run continues, deliveries wait.")
        if self._said_away and not away:
            logger.warning("The tracking server answers again.")
        self._said_away = away

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; a flush that begins meanwhile cuts it short."""
        hurried = self._hurry
        limit = min(seconds, _FLUSH_PAUSE_S) if hurried else seconds
        self._changed.wait_for(lambda: self._closing or self._hurry != hurried, timeout=limit)

    def _attempt(self, delivery: list[Point] | _Call) -> Exception | None:
        try:
            if isinstance(delivery, _Call):
                delivery.deliver()
            else:
                self._send_points(delivery)
        except Exception as error:
            logger.debug("A delivery to the tracking server failed.", exc_info=True)
            return error
        return None

    def _remove(self, delivery: list[Point] | _Call) -> None:
        """Take a finished delivery from the queue's head, less what was dropped from it meanwhile."""
        items = [delivery] if isinstance(delivery, _Call) else delivery
        done = {id(item) for item in items}
        while self._queue and id(self._queue[0]) in done:
            if isinstance(self._queue.popleft(), Point):
                self._num_points -= 1
