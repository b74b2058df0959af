"""Addresses of Ray clusters to launch on, checked without Ray, which takes seconds to load."""

from __future__ import annotations

import socket

from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError

LOCAL = "local"
_PROBE_TIMEOUT_S = 5.0
FROM_OUTSIDE = (
    "run launch on a node of the cluster, where the address is HOST:PORT (port 6379), or send the job there with "
    "`refinedet submit`."
)


def cluster_address(address: str | None) -> str:
    """HOST:PORT of the cluster to join: as given, of this job (RAY_ADDRESS), or `LOCAL` for a node of its own."""
    return address or settings.read("RAY_ADDRESS") or LOCAL


def check_reachable(address: str) -> None:
    """Probe the port first: ray.init retries for minutes, and prints its attempts."""
    if address in ("auto", LOCAL):
        return
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address!r} is the address of a dashboard, to which `refinedet submit` sends jobs; launch takes "
            "HOST:PORT of the cluster itself (port 6379), on one of its nodes."
        )
    if address.startswith("ray://"):
        raise UserError(f"{address!r} is for clients outside the cluster; {FROM_OUTSIDE}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"A cluster's address reads HOST:PORT (port 6379), received {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"Nothing answers at {address!r} ({error.strerror or error}); check the address with `ray status`, or "
            "remove --address to run here."
        ) from None
