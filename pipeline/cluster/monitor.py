"""What travels between the workers of a job and its driver: records and events one way, the wish to stop the other.

One small actor beside the driver. Workers never wait for it: a push is sent and forgotten, and the answer to the
last one says whether to stop.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayError
from refinedet.pipeline.cluster.session import NAMESPACE
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

_LOOK_FOR_DRAINS_EVERY_S = 2.0
_FREED_WITHIN_S = 15.0
"""Ray frees the name of a job whose driver was killed"""


class _Monitor:
    def __init__(self) -> None:
        self._messages: list[tuple[int, str, Any]] = []
        self._stop = False
        self._draining: list[str] = []
        self._looked = 0.0

    def push(self, rank: int, kind: str, content: Any) -> bool:
        """Keep a message for the driver; returns whether the workers are to stop."""
        self._messages.append((rank, kind, content))
        return self._stop

    def drain(self) -> tuple[list[tuple[int, str, Any]], list[str]]:
        messages, self._messages = self._messages, []
        if time.monotonic() - self._looked > _LOOK_FOR_DRAINS_EVERY_S:
            self._looked, self._draining = time.monotonic(), _draining_nodes()
        return messages, self._draining

    def set_stop(self, stop: bool) -> None:
        self._stop = stop


def _draining_nodes() -> list[str]:
    """Ids of nodes that are about to be taken away. Ray Train asks Ray in the same way; there is no public one."""
    try:
        return list(ray._private.state.state.get_draining_nodes())  # type: ignore[attr-defined]
    except Exception as error:  # another version of Ray: preemption is then a failure like others
        logger.warning("Ray does not say which nodes drain: %s", error)
        return []


class Monitor:
    """The driver's side; one for all stages of a job. As a context manager it ends with it.

    A cluster has one of a run, which is what keeps two jobs off a run behind a URI: UserError for the second.
    """

    def __init__(self, run_path: str) -> None:
        self.name = f"monitor:{run_path}"
        self._actor = self._start(run_path)
        self.draining: set[str] = set()
        """ids of nodes that are about to be taken away"""

    def _start(self, run_path: str) -> ActorProxy[_Monitor]:
        node = ray.get_runtime_context().get_node_id()
        monitor = ray.remote(_Monitor).options(
            name=self.name, namespace=NAMESPACE, num_cpus=0, label_selector={"ray.io/node-id": node}
        )
        deadline = time.monotonic() + _FREED_WITHIN_S
        while True:
            try:
                return monitor.remote()
            except ValueError:  # the name is taken
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another job of this cluster works on the run {run_path}; wait for it, stop it, or choose "
                        "another name (name=OTHER)."
                    ) from None
                time.sleep(0.5)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        ray.kill(self._actor)  # type: ignore[arg-type] - a proxy is a handle

    def drain(self) -> list[tuple[int, str, Any]]:
        """Messages since the last call: (rank, kind, content)."""
        messages, draining = ray.get(self._actor.drain.remote())
        self.draining = set(draining)
        return messages

    def set_stop(self, stop: bool) -> None:
        """Whether the workers are to save and end."""
        ray.get(self._actor.set_stop.remote(stop))


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
