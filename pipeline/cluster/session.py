"""A connection to a Ray cluster: one that runs already, or a local node that starts and ends with the launch."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import ray
from ray.exceptions import AuthenticationError
from refinedet.pipeline.cluster.capacity import Node, check_capacity
from refinedet.pipeline.cluster.local_node import local_node
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import restore_loggers

NAMESPACE = "refinedet"
_PROBE_TIMEOUT_S = 5.0
_FROM_OUTSIDE = (
    "run launch on a node of the cluster, where the address is HOST:PORT (port 6379), or send the job there with "
    "`refinedet submit`."
)


@contextlib.contextmanager
def ray_session(cluster: Cluster, address: str | None = None) -> Iterator[None]:
    """Connect to Ray, check that the cluster can hold the workers, and disconnect at the end.

    address   HOST:PORT of a cluster, or "auto"; default: the cluster of this job (RAY_ADDRESS), else a local node
    Raises UserError where no cluster answers, where its Ray or Python differs from ours, or where it is too small for
    `cluster.workers`.
    """
    address = address or settings.read("RAY_ADDRESS") or "local"
    settings.provide("ray")
    with contextlib.ExitStack() as stack:
        if address == "local":
            connect_to = stack.enter_context(local_node())
        else:
            connect_to = address
            _check_reachable(address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            restore_loggers()  # Ray gives its logger a handler to the terminal when it is imported
            ray.init(
                address=connect_to,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except (ConnectionError, TimeoutError, ValueError, AuthenticationError, RuntimeError) as error:
            raise _explain(error, address) from error
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler, which ray.init installs, ends without saving
        stack.callback(ray.shutdown)
        check_capacity(cluster, session_nodes())
        yield


def session_nodes() -> list[Node]:
    """The nodes that are alive."""
    return [Node(entry["Resources"], entry["Labels"] or {}) for entry in ray.nodes() if entry["Alive"]]


def _explain(error: Exception, address: str) -> Exception:
    """The UserError for what a connection raised; other errors as they are."""
    if isinstance(error, AuthenticationError):
        return UserError(
            f"The cluster at {address!r} refused the authentication token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "or RAY_AUTH_TOKEN_PATH to the cluster's."
        )
    message = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
    if "Version mismatch" in message:
        return UserError(f"The cluster at {address!r} runs another version: {message}; install the same.")
    if "No node info found" in message:
        return UserError(f"This machine is no node of the cluster at {address!r}; {_FROM_OUTSIDE}")
    if isinstance(error, RuntimeError):
        return error
    return UserError(
        f"There is no Ray cluster to be reached at {address!r} ({message}); check the address with `ray status`, or "
        "leave out --address to run here."
    )


def _check_reachable(address: str) -> None:
    """Probe the port first: ray.init retries for minutes, and prints its attempts."""
    if address == "auto":
        return
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
        socket.create_connection((host, int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"Nothing answers at {address!r} ({error.strerror or error}); check the address with `ray status`, or "
            "leave out --address to run here."
        ) from None
