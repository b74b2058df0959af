#!/usr/bin/env python3
"""Turn a cloud's notice that this spot machine will be taken away into `ray drain-node`; training then saves and moves.

It runs beside Ray on every spot node, in Ray's own container, whose address, token and node it uses:

    python3 drain_on_notice.py --cloud aws

The standard library alone. It ends with status 0 once the node is drained, and never before a notice. A metadata server
that does not answer is asked again.
"""

from __future__ import annotations

import argparse
import datetime
import email.utils
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

METADATA = "http://169.254.169.254"
GRANTED_S = {"aws": 120, "gcp": 30, "azure": 30}
"""between notice and end, as each cloud documents it"""
_DRAIN_TIMEOUT_S = 60


@dataclass(frozen=True)
class Notice:
    """Announcement of the metadata server; seconds from now until the machine ends."""

    reason: str
    remaining_s: int


class Metadata:
    """A metadata server, asked over HTTP with a short limit."""

    def __init__(self, endpoint: str, timeout_s: float = 3.0) -> None:
        self._endpoint, self._timeout_s = endpoint.rstrip("/"), timeout_s

    def get(self, path: str, method: str = "GET", **headers: str) -> str | None:
        """The body; None where there is nothing at `path`. Raises OSError."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self._endpoint + path, headers=named, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is a neighbour, behind no proxy
        try:
            with opener.open(request, timeout=self._timeout_s) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


class Aws:
    """EC2: a session token (IMDSv2), then `spot/instance-action`, which is missing until the notice."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata, self._token = metadata, ""

    def __call__(self) -> Notice | None:
        if not self._token:
            lifetime = {"X_aws_ec2_metadata_token_ttl_seconds": "21600"}
            self._token = self._metadata.get("/latest/api/token", "PUT", **lifetime) or ""
        try:
            found = self._metadata.get("/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=self._token)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                self._token = ""  # expired
            raise
        if found is None:
            return None
        action = json.loads(found)
        ends = datetime.datetime.fromisoformat(action["time"].replace("Z", "+00:00"))
        return Notice(f"AWS will {action['action']} this spot instance", _seconds_until(ends))


class Gcp:
    """Compute Engine: `instance/preempted` becomes TRUE."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def __call__(self) -> Notice | None:
        found = self._metadata.get("/computeMetadata/v1/instance/preempted", Metadata_Flavor="Google")
        if (found or "").strip() != "TRUE":
            return None
        return Notice("Google Cloud preempts this machine", GRANTED_S["gcp"])


class Azure:
    """Scheduled events: a Preempt or Terminate event that names this machine."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata, self._name = metadata, ""

    def __call__(self) -> Notice | None:
        if not self._name:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = (self._metadata.get(path, Metadata="true") or "").strip()
        found = self._metadata.get("/metadata/scheduledevents?api-version=2020-07-01", Metadata="true")
        for event in json.loads(found or "{}").get("Events", ()):
            if event["EventType"] in ("Preempt", "Terminate") and self._name in event["Resources"]:
                before = event.get("NotBefore")
                remaining = _seconds_until(email.utils.parsedate_to_datetime(before)) if before else 0
                return Notice(f"Azure will {event['EventType'].lower()} this machine", remaining)
        return None


CLOUDS: dict[str, Callable[[Metadata], Callable[[], Notice | None]]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def _seconds_until(moment: datetime.datetime) -> int:
    return max(0, round((moment - datetime.datetime.now(datetime.UTC)).total_seconds()))


def wait_for_notice(poll: Callable[[], Notice | None], interval_s: float) -> Notice:
    """Poll until a notice exists. A server that fails is reported once, until it answers again."""
    failing = False
    while True:
        try:
            notice = poll()
            if failing:
                _say("the metadata server answers again")
            failing = False
            if notice:
                return notice
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not failing:
                _say(f"the metadata server does not answer ({type(error).__name__}: {error}); retrying")
            failing = True
        time.sleep(interval_s)


def drain(notice: Notice, interval_s: float, node_id: str | None = None) -> bool:
    """Drain a node, by default this one; repeat what fails until its time is over. Returns whether it was drained."""
    deadline = time.monotonic() + notice.remaining_s
    while True:
        remaining = max(0, round(deadline - time.monotonic()))
        command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.reason]
        command += ["--deadline-remaining-seconds", str(remaining), *(("--node-id", node_id) if node_id else ())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DRAIN_TIMEOUT_S)
            if done.returncode == 0:
                _say(f"{notice.reason} in {notice.remaining_s} s: the node drains")
                return True
            fault = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = str(error)
        _say(f"{notice.reason} in {remaining} s, and `ray drain-node` failed: {fault}")
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval_s)


def _say(message: str) -> None:
    sys.stderr.write(f"drain_on_notice: {message}\n")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cloud", choices=CLOUDS, required=True)
    parser.add_argument("--endpoint", default=METADATA, help="of the metadata server")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two questions")
    parser.add_argument("--node-id", help="of Ray; default: the node on this machine, which Ray takes seconds to find")
    options = parser.parse_args()
    poll = CLOUDS[options.cloud](Metadata(options.endpoint))
    return 0 if drain(wait_for_notice(poll, options.interval), options.interval, options.node_id) else 1


if __name__ == "__main__":
    sys.exit(main())
