"""`refinedet serve`: a detector on Ray Serve, until it is stopped."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray import serve
from refinedet.pipeline.cluster.detection_service import DetectionService, Settings
from refinedet.pipeline.cluster.session import ray_session, session_nodes
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs import settings as environment

NAME = "refinedet"
_ONGOING = 16
"""requests in a replica at a time: what bounds its memory"""
_WAITING = 64
"""further requests that wait; more are answered with 503"""
_TIMEOUT_S = 60.0
"""for a whole request, also of a client that sends slowly"""

_MALLOC = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": str(2**17)}
"""glibc's own: training keeps large blocks for its next step, a server gives them back after a large image"""


@dataclass(frozen=True)
class Server:
    """Place where a detector is served.

    gpus     of each replica
    address  of the cluster, as `refinedet launch`; default: a local node, which ends with the server
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    gpus: float = 0.0
    address: str | None = None


def serve_detector(
    weights: str, settings: Settings, server: Server, *, stop: threading.Event, report: Callable[[str], None]
) -> None:
    """Serve a detector until `stop` is set.

    weights  as `Predictor.load`, readable on every node
    report   called with the server's addresses, a line each, once it answers
    Raises UserError where the cluster cannot hold the replicas.
    """
    for name, value in _MALLOC.items():  # Ray's processes inherit it
        environment.suggest(name, value)
    wanted = Cluster(workers=server.replicas, gpus_per_worker=server.gpus)
    with ray_session(wanted, server.address):
        most = max(int(node.resources.get("CPU", 1)) for node in session_nodes())
        cores = max(1, most // server.replicas)
        quiet = {"log_level": logging.WARNING, "enable_access_log": False}
        serve.start(
            http_options={"host": server.host, "port": server.port, "request_timeout_s": _TIMEOUT_S},
            logging_config=quiet,
        )
        try:
            deployment = serve.deployment(
                DetectionService,
                name="detector",
                num_replicas=server.replicas,
                max_ongoing_requests=_ONGOING,
                max_queued_requests=_WAITING,
                ray_actor_options={"num_cpus": cores, "num_gpus": server.gpus},
                logging_config=quiet,
            )
            serve.run(
                deployment.bind(weights, dataclasses.replace(settings, threads=cores)), name=NAME, route_prefix="/"
            )
            shown = f"[{server.host}]" if ":" in server.host else server.host
            report(f"http://{shown}:{server.port}/  page; POST an image to /predict or /invocations; /health")
            report(f"http://{shown}:{metrics_port()}/metrics  ray_serve_* and ray_refinedet_*, for Prometheus")
            stop.wait()
        finally:
            serve.shutdown()


def metrics_port() -> int:
    """The port at which this node exports Ray's metrics."""
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
