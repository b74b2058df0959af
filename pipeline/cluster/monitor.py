"""What travels between the workers of a job and its driver: records and events one way, the wish to stop the other.

One small actor beside the driver. Workers never wait for it: a push is sent and forgotten, and the answer to the
last one says whether to stop.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from pipeline.cluster.session import NAMESPACE

logger = logging.getLogger(__name__)


class _Monitor:
    def __init__(self) -> None:
        self._messages: list[tuple[int, str, Any]] = []
        self._stop = False

    def push(self, rank: int, kind: str, content: Any) -> bool:
        """Keep a message for the driver; returns whether the job is to stop."""
        self._messages.append((rank, kind, content))
        return self._stop

    def drain(self) -> list[tuple[int, str, Any]]:
        messages, self._messages = self._messages, []
        return messages

    def request_stop(self) -> None:
        self._stop = True


class Monitor:
    """The driver's side."""

    def __init__(self, run_path: str) -> None:
        self.name = f"monitor:{run_path}"
        node = ray.get_runtime_context().get_node_id()
        self._actor = (
            ray.remote(_Monitor)
            .options(
                name=self.name,
                namespace=NAMESPACE,
                num_cpus=0,
                label_selector={"ray.io/node-id": node},
            )
            .remote()
        )
        ray.get(self._actor.drain.remote())

    def drain(self) -> list[tuple[int, str, Any]]:
        """Messages since the last call: (rank, kind, content)."""
        return ray.get(self._actor.drain.remote())

    def request_stop(self) -> None:
        ray.get(self._actor.request_stop.remote())

    def close(self) -> None:
        ray.kill(self._actor)  # type: ignore[arg-type] - a proxy is a handle


class MonitorClient:
    """A worker's side. A monitor that cannot be reached costs its records, never a step."""

    def __init__(self, name: str, rank: int) -> None:
        self._actor: ActorHandle | None = ray.get_actor(name, namespace=NAMESPACE)
        self._rank = rank
        self._answers: list[ray.ObjectRef] = []
        self.stop_requested = False

    def push(self, kind: str, content: Any, *, wait: bool = False) -> None:
        """Send a message. `wait`: return only once it has arrived."""
        if self._actor is None:
            return
        self._answers.append(self._actor.push.remote(self._rank, kind, content))
        self._read_answers(timeout_s=10.0 if wait else 0.0)

    def _read_answers(self, timeout_s: float) -> None:
        ready, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=timeout_s)
        try:
            self.stop_requested |= any(ray.get(ready))
        except RayError as error:
            logger.warning("The driver's monitor is gone (%s); records are no longer sent", type(error).__name__)
            self._actor, self._answers = None, []
