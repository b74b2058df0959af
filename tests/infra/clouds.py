"""Simulated metadata servers of three clouds. They follow the clouds' documentation, not our code.

EC2 refuses requests without a session token, Compute Engine those without its header, Azure those without its own.

    python -m tests.infra.clouds aws 169.254.169.254 80 NOTICE      announces once the file NOTICE exists
"""

from __future__ import annotations

import datetime
import email.utils
import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = tuple[int, str]


def instant(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def ec2(request: BaseHTTPRequestHandler, noticed: bool) -> Answer:
    if (request.command, request.path) == ("PUT", "/latest/api/token"):
        return (200, "secret") if request.headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
    if request.headers["X-aws-ec2-metadata-token"] != "secret":
        return 401, ""
    if request.path != "/latest/meta-data/spot/instance-action" or not noticed:
        return 404, ""
    return 200, json.dumps({"action": "terminate", "time": instant(118).strftime("%Y-%m-%dT%H:%M:%SZ")})


def compute_engine(request: BaseHTTPRequestHandler, noticed: bool) -> Answer:
    if request.headers["Metadata-Flavor"] != "Google":
        return 403, ""
    if request.path != "/computeMetadata/v1/instance/preempted":
        return 404, ""
    return 200, "TRUE" if noticed else "FALSE"


def azure(request: BaseHTTPRequestHandler, noticed: bool) -> Answer:
    if request.headers["Metadata"] != "true" or "api-version=" not in request.path:
        return 400, ""
    if request.path.startswith("/metadata/instance/compute/name"):
        return 200, "pool-vm_3"
    before = email.utils.format_datetime(instant(28).replace(tzinfo=datetime.UTC), usegmt=True)
    events = [
        {"EventId": "1", "EventType": "Preempt", "Resources": ["pool-vm_2"], "NotBefore": before},  # a neighbour
        {"EventId": "2", "EventType": "Freeze", "Resources": ["pool-vm_3"], "NotBefore": before},
    ]
    if noticed:
        events.append({"EventId": "3", "EventType": "Preempt", "Resources": ["pool-vm_3"], "NotBefore": before})
    return 200, json.dumps({"DocumentIncarnation": 1, "Events": events})


class Cloud:
    """A metadata server; `noticed` makes it announce, `broken` makes it fail."""

    def __init__(
        self, answer: Callable[[BaseHTTPRequestHandler, bool], Answer], address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self.noticed = self.broken = False
        self.requests = 0
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                cloud.requests += 1
                status, body = (500, "") if cloud.broken else answer(self, cloud.noticed)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = _reply

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(address, Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def wait_for(self, requests: int) -> None:
        deadline = time.monotonic() + 60
        while self.requests < requests:
            assert time.monotonic() < deadline, f"{self.requests} requests came"
            time.sleep(0.02)


CLOUDS = {"aws": ec2, "gcp": compute_engine, "azure": azure}


def main(name: str, host: str, port: str, notice: str) -> None:
    cloud = Cloud(CLOUDS[name], (host, int(port)))
    while True:
        cloud.noticed = Path(notice).exists()
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
