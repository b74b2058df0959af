"""Messages from the workers of a job to its driver, and the driver's request to stop on the way back.

One small actor beside the driver. Workers never wait for it. Ray restarts it where it dies: messages that it held are
lost, steps are not.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

logger = logging.getLogger(__name__)

_TAKE_TIMEOUT_S = 10.0
_PUSH_TIMEOUT_S = 10.0
_MOST_UNANSWERED = 1000
_ANSWERS_S = 0.25


class _Mailbox:
    """State of the actor; the driver sends the request to stop with every call, so that a restart loses nothing."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, Any]] = []
        self._stop = False

    def push(self, rank: int, message: Any) -> bool:
        self._messages.append((rank, message))
        return self._stop

    def take(self, stop: bool) -> list[tuple[int, Any]]:
        self._stop = stop
        messages, self._messages = self._messages, []
        return messages


class Mailbox:
    """Driver's side, one for all stages of a launch. A context manager: the actor ends with it."""

    def __init__(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        self.actor: Any = (
            ray.remote(_Mailbox).options(num_cpus=0, max_restarts=-1, label_selector={"ray.io/node-id": node}).remote()
        )

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        ray.kill(self.actor)

    def take(self, *, stop: bool = False) -> list[tuple[int, Any]]:
        """Messages since the last call as (rank, message); empty while the actor restarts.

        stop  request that the workers save and end
        """
        try:
            return ray.get(self.actor.take.remote(stop), timeout=_TAKE_TIMEOUT_S)
        except (RayError, GetTimeoutError) as error:
            logger.warning("messages of the workers may be lost: the mailbox does not answer (%s)", _name(error))
            return []


class MailboxLink:
    """Worker's side, for every thread. A mailbox that cannot be reached costs messages, never a step.

    Answers are read every `_ANSWERS_S`, since reading them takes as long as sending.
    """

    def __init__(self, actor: Any, rank: int) -> None:
        self._actor, self._rank = actor, rank
        self._lock = threading.Lock()
        self._unread: list[ray.ObjectRef] = []
        self._read_at = 0.0
        self._failing = False
        self.stop_requested = False

    def push(self, message: Any, *, wait: bool = False) -> None:
        """Send a message. `wait`: return once it has arrived, or after some seconds."""
        answer = self._actor.push.remote(self._rank, message)
        now = time.monotonic()
        with self._lock:
            self._unread.append(answer)
            if not wait and now < self._read_at:
                return
            self._read_at = now + _ANSWERS_S
            answers, self._unread = self._unread, []  # Ray's wait fails where another thread changes its list
        ready, waiting = ray.wait(answers, num_returns=len(answers), timeout=_PUSH_TIMEOUT_S if wait else 0.0)
        with self._lock:
            self._unread = [*waiting, *self._unread][-_MOST_UNANSWERED:]
        for answer in ready:
            try:
                if ray.get(answer):
                    self.stop_requested = True
                self._failing = False
            except RayError as error:
                if not self._failing:
                    logger.warning("a message to the driver was lost (%s)", _name(error))
                self._failing = True


def _name(error: Exception) -> str:
    return type(error).__name__
