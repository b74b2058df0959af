"""The HTTP side of a cluster: its dashboard, with Ray's Jobs API, and what it answers in words a user can act on."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from refinedet.pipeline.cluster.capacity import Node, nodes_of
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError

CERTIFICATES = "RAY_TLS_CA_CERT"
"""environment: file or folder of the authorities that may sign for an https:// dashboard; Ray's own name for it"""
HEADERS = "RAY_JOB_HEADERS"
"""environment: JSON of further HTTP headers, as a proxy that asks for a login wants them; Ray's own name for it"""
_MAX_NODES = 10_000


# Each sets its own level; what they say of uploads and sockets is not the user's business.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


class Dashboard(JobSubmissionClient):
    """Ray's client, and the two questions that it does not ask: which Ray is there, and which nodes.

    Requests go through the proxies of HTTPS_PROXY, HTTP_PROXY and NO_PROXY, and trust what REQUESTS_CA_BUNDLE says.
    Use within `said_clearly`.
    """

    def __init__(self, address: str) -> None:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(address, verify=settings.read(CERTIFICATES) or True, headers=_headers())

    def ray_version(self) -> str:
        return str(self._answer("/api/version")["ray_version"])

    def nodes(self) -> list[Node]:
        """The nodes that are alive."""
        answer = self._answer(f"/api/v0/nodes?limit={_MAX_NODES}")
        entries = answer["data"]["result"]["result"]
        return nodes_of(entries, alive="state", resources="resources_total", labels="labels")

    def _answer(self, path: str) -> Any:
        response = self._do_request("GET", path)
        response.raise_for_status()
        return response.json()


def connect(address: str) -> Dashboard:
    """A client of the cluster at `address`. Raises UserError where none answers, or one of another Ray."""
    with said_clearly(address):
        client = Dashboard(address)
        theirs, ours = client.ray_version(), ray.__version__
    if theirs != ours:
        raise UserError(
            f"The cluster at {address} runs Ray {theirs}, this machine has {ours}; install ray=={theirs} here "
            f"(Python {platform.python_version()}), or update the cluster."
        )
    return client


def dashboard_address(address: str | None) -> str:
    """`address` as a URL; by default Ray's own variable, else this machine."""
    address = address or settings.read("RAY_API_SERVER_ADDRESS") or ""
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"The address of a cluster's dashboard reads http://HOST:8265, received {address!r}; ray:// addresses are "
            "for `refinedet launch`."
        )
    return address


@contextmanager
def said_clearly(address: str) -> Iterator[None]:
    """Ray's errors as one sentence: nobody there, a wrong token, a certificate, anything else it says."""
    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        known = (settings.read("RAY_AUTH_MODE") or "").lower() == "token"
        raise UserError(
            f"The cluster at {address} refused {'the' if known else 'a request without an'} authentication token; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        ) from error
    except (ConnectionError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{CERTIFICATES}: {one_line(error)}; give a file or folder that is there.") from error
        if isinstance(error, requests.HTTPError | requests.JSONDecodeError):
            raise UserError(
                f"What answers at {address} is no Ray dashboard ({one_line(error)}); give the address of one, "
                "http://HOST:8265."
            ) from error
        if _is_about_certificates(error):
            raise UserError(
                f"The certificate of {address} is not trusted ({one_line(_innermost(error))}); set {CERTIFICATES} to "
                "the file of its authority."
            ) from error
        raise UserError(
            f"No Ray cluster answers at {address} ({one_line(error)}); give the address of its dashboard, "
            "http://HOST:8265."
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"The cluster at {address} answered: {one_line(error)}.") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__


def _headers() -> dict[str, Any] | None:
    text = settings.read(HEADERS)
    if not text:
        return None
    try:
        headers = json.loads(text)
        assert isinstance(headers, dict)
    except (ValueError, AssertionError):  # the text may hold a password: it is not shown
        raise UserError(f'{HEADERS} must be a JSON object of headers, as in {{"Authorization": "..."}}.') from None
    return headers


def _is_about_certificates(error: BaseException) -> bool:
    while error is not None:
        if isinstance(error, requests.exceptions.SSLError):
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def _innermost(error: BaseException) -> BaseException:
    while following := error.__cause__ or error.__context__:
        error = following
    return error
