"""A connection to a Ray cluster: one that runs already, or a local node that starts and ends with the launch."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator

import ray
from ray.exceptions import AuthenticationError
from refinedet.pipeline.cluster.addresses import FROM_OUTSIDE, LOCAL, check_reachable, cluster_address
from refinedet.pipeline.cluster.capacity import Node, check_capacity
from refinedet.pipeline.cluster.local_node import local_node
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import restore_loggers

NAMESPACE = "refinedet"


@contextlib.contextmanager
def ray_session(cluster: Cluster, address: str | None = None) -> Iterator[None]:
    """Connect to Ray, check that the cluster can hold the workers, and disconnect at the end.

    address   HOST:PORT of a cluster, or "auto"; default: the cluster of this job (RAY_ADDRESS), else a local node
    Raises UserError where no cluster answers, where its Ray or Python differs from ours, or where it is too small for
    `cluster.workers`.
    """
    address = cluster_address(address)
    settings.provide("ray")
    with contextlib.ExitStack() as stack:
        if address == LOCAL:
            connect_to = stack.enter_context(local_node())
        else:
            connect_to = address
            check_reachable(address)
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
        return UserError(f"This machine is no node of the cluster at {address!r}; {FROM_OUTSIDE}")
    if isinstance(error, RuntimeError):
        return error
    return UserError(
        f"There is no Ray cluster to be reached at {address!r} ({message}); check the address with `ray status`, or "
        "remove --address to run here."
    )
