"""The HTTP side of a cluster: its dashboard, with Ray's Jobs API, and its errors in sentences a user can act on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException
from refinedet.pipeline.cluster.capacity import Node
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError

CERTIFICATES = "REQUESTS_CA_BUNDLE"
"""environment: file or directory of the authorities that may sign for an https:// dashboard, as Requests reads it"""
HEADERS = "RAY_JOB_HEADERS"
"""environment: JSON of further HTTP headers, for a proxy that requires a login; Ray's own name for it"""
_MOST_NODES = 10_000


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster at `address`; UserError where none answers.

    Requests go through the proxies of HTTPS_PROXY, HTTP_PROXY and NO_PROXY. Use the client within `clear_errors`.
    """
    for handler in logging.getLogger("ray").handlers:  # uploads and sockets are not for the terminal
        handler.setLevel(logging.WARNING)
    with clear_errors(address):
        return JobSubmissionClient(address, headers=_headers())


def cluster_nodes(address: str) -> list[Node]:
    """The nodes of the cluster at `address` that are alive. Use within `clear_errors`."""
    options = ListApiOptions(limit=_MOST_NODES, filters=[("state", "=", "ALIVE")])  # pyright: ignore[reportCallIssue]
    nodes: list[Any] = StateApiClient(address, headers=_headers()).list(
        StateResource.NODES, options, raise_on_missing_output=False
    )
    return [Node(dict(node.resources_total or {}), dict(node.labels or {})) for node in nodes]


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
def clear_errors(address: str) -> Iterator[None]:
    """Turn Ray's errors into one sentence: no answer, a wrong token, a certificate, anything else."""
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
        if "TLS CA certificate bundle" in str(error):
            raise UserError(f"{CERTIFICATES}: {one_line(error)}; give a file or directory that exists.") from error
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
    except (RayStateApiException, RuntimeError, ValueError, KeyError) as error:
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
