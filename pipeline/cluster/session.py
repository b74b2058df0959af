"""A connection to a Ray cluster: a local one that starts and ends with the job, or one that is already there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from refinedet.pipeline.cluster.capacity import Node, check_capacity, nodes_of
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import restore_loggers

logger = logging.getLogger(__name__)

NAMESPACE = "refinedet"
_KNOCK_TIMEOUT_S = 5.0
_LOCAL_STARTS = 3
_FROM_OUTSIDE = (
    "run launch on a node of the cluster, where the address is HOST:PORT (port 6379), or send the job there with "
    "`refinedet submit`."
)

# What Ray, DeepSpeed and Ray Train read from the environment of a job, set in this one place. Logs go to files;
# Ray's OpenTelemetry and usage threads are not wanted on a training node.
_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the spec keep their meaning
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",  # the controller is in the driver, whose log is launch.log
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after the end of a session must not start another
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver of training watches, and saves first
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # its 2 s are lost at every end, good or bad
    # The default start timeout, 60 s, is less than a loaded node takes to import torch and DeepSpeed.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}


@contextlib.contextmanager
def ray_session(cluster: Cluster, address: str | None = None) -> Iterator[None]:
    """Connect, check that the cluster can hold the workers, and leave it as it was.

    address   of a cluster; default: the one of this job (RAY_ADDRESS), else a local one started for the occasion
    Raises UserError when there is no cluster at the address, when its Ray or Python differs from ours, or when it is
    too small for `cluster.workers`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    load_ray()
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        raise AssertionError("one session at a time in a process")
    if address not in ("local", "auto"):
        _check_reachable(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address)
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise UserError(
            f"There is no Ray cluster to be reached at {address!r} ({_first_line(error)}); check the address with "
            "`ray status`, or leave out --address to run here."
        ) from error
    except AuthenticationError as error:
        raise UserError(
            f"The cluster at {address!r} refused the authentication token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to the cluster's."
        ) from error
    except RuntimeError as error:
        message = _first_line(error)
        if "Version mismatch" in str(error):
            message = " ".join(str(error).split())
            raise UserError(f"The cluster at {address!r} runs another version: {message}; install the same.") from error
        if "No node info found" in str(error):
            raise UserError(f"This machine is no node of the cluster at {address!r}; {_FROM_OUTSIDE}") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler, which ray.init installs, ends without saving
    try:
        check_capacity(cluster, session_nodes())
        yield
    finally:
        ray.shutdown()


def load_ray() -> None:
    """Import Ray, which reads its environment then; it takes a second."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    importlib.import_module("ray")


def session_nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    return nodes_of(ray.nodes(), alive="Alive", resources="Resources", labels="Labels")


def _connect(address: str) -> None:
    import ray

    restore_loggers()  # Ray gives its logger a handler to the terminal when it is imported
    _log_words_of_nodes()
    quiet = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address != "local":
        ray.init(address=address, **quiet)
        return
    for attempt in range(_LOCAL_STARTS):
        try:
            with _lean_head():
                ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)
            return
        except Exception as error:  # Ray gives a local node 30 s, a busy machine needs more; it raises the base class
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt + 1 == _LOCAL_STARTS:
                raise
            logger.warning("the local Ray node did not start in time; trying again")


@contextlib.contextmanager
def _lean_head() -> Iterator[None]:
    """A local node needs no autoscaler, and no process that sends the workers' logs to the driver: two starts less."""
    from ray._private import parameter

    whole = parameter.RayParams
    parameter.RayParams = functools.partial(whole, no_monitor=True, include_log_monitor=False)  # type: ignore[misc]
    try:
        yield
    finally:
        parameter.RayParams = whole


def _log_words_of_nodes() -> None:
    """What Ray prints of nodes and workers that die, with pages of their logs, goes into the log file."""
    from ray._private import worker

    def to_log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        logger.warning("Ray says: %s", "\n".join(data["lines"]))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = to_log  # type: ignore[assignment]


def _check_reachable(address: str) -> None:
    """Knock before Ray does: it would try for minutes, and print what it tries."""
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address!r} is the address of a dashboard, to which `refinedet submit` sends jobs; launch takes "
            "HOST:PORT of the cluster itself (port 6379), on one of its nodes."
        )
    if address.startswith("ray://"):
        raise UserError(f"{address!r} is for clients outside the cluster; {_FROM_OUTSIDE}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"A cluster's address reads HOST:PORT (port 6379), received {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"Nothing answers at {address!r} ({error.strerror or error}); check the address with `ray status`, or "
            "leave out --address to run here."
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
