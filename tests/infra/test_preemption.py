"""infra/preemption for real, in a process of its own: simulated metadata servers of three clouds, a `ray` that records.

`tests/cluster/test_node_loss.py` runs it with Ray's own `ray drain-node`, on a host of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.infra.clouds import Answer, Cloud, azure, compute_engine, ec2, instant

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "preemption" / "drain_on_notice.py"


@contextmanager
def watching(cloud: Cloud, name: str, folder: Path, ray: str) -> Iterator[subprocess.Popen]:
    """The script in a process, with an executable named `ray` first on PATH."""
    fake = folder / "bin" / "ray"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\n{ray}")
    fake.chmod(0o755)
    command = [sys.executable, str(SCRIPT), "--cloud", name, "--endpoint", cloud.url, "--interval", "0.1"]
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "http_proxy": "http://127.0.0.1:9"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        cloud.server.shutdown()
        cloud.server.server_close()


def recording(file: Path, failures: int = 0) -> str:
    """A `ray` that appends its arguments to a file, and fails the first times."""
    return (
        "import json, pathlib, sys\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "calls = json.loads(file.read_text()) if file.exists() else []\n"
        "file.write_text(json.dumps([*calls, sys.argv[1:]]))\n"
        f"sys.exit('no GCS' if len(calls) < {failures} else 0)\n"
    )


@pytest.mark.parametrize(
    ("name", "answer", "said", "seconds"),
    [
        ("aws", ec2, "AWS will terminate this spot instance", 118),
        ("gcp", compute_engine, "Google Cloud preempts this machine", 30),
        ("azure", azure, "Azure will preempt this machine", 28),
    ],
)
def test_a_notice_becomes_a_drain_with_the_time_that_is_left(name, answer, said, seconds, tmp_path):
    cloud, calls = Cloud(answer), tmp_path / "calls.json"
    with watching(cloud, name, tmp_path, recording(calls)) as process:
        cloud.wait_for(6)
        assert process.poll() is None
        assert not calls.exists(), "there is no notice yet"
        cloud.noticed = True
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    (arguments,) = json.loads(calls.read_text())
    *plain, left = arguments
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", said, "--deadline-remaining-seconds"]
    assert plain == ["drain-node", *reason]
    assert seconds - 3 <= int(left) <= seconds
    assert f"{said} in {left} s: the node drains" in log


def test_every_option_of_the_command_is_rays():
    """The fake takes anything; Ray's own help names what it takes."""
    ray = Path(sys.executable).parent / "ray"
    shown = subprocess.run([str(ray), "drain-node", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "--deadline-remaining-seconds"):
        assert option in shown


@pytest.mark.parametrize(("name", "answer"), [("aws", ec2), ("gcp", compute_engine), ("azure", azure)])
def test_a_metadata_server_that_fails_is_asked_again_and_reported_once(name, answer, tmp_path):
    cloud, calls = Cloud(answer), tmp_path / "calls.json"
    cloud.broken = True
    with watching(cloud, name, tmp_path, recording(calls)) as process:
        cloud.wait_for(5)
        assert process.poll() is None
        cloud.broken, cloud.noticed = False, True
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert log.count("does not answer") == 1
    assert len(json.loads(calls.read_text())) == 1


def test_a_token_that_ends_is_asked_for_again(tmp_path):
    """EC2's tokens end; here the first one is refused from the third request on."""
    tokens = ["first", "second"]
    served = 0

    def answer(request: BaseHTTPRequestHandler, noticed: bool) -> Answer:
        nonlocal served
        if request.command == "PUT":
            return 200, tokens[0] if served < 3 else tokens[1]
        served += 1
        valid = tokens[0] if served < 3 else tokens[1]
        if request.headers["X-aws-ec2-metadata-token"] != valid:
            return 401, ""
        return ec2_action(noticed)

    def ec2_action(noticed: bool) -> Answer:
        action = {"action": "stop", "time": instant(100).strftime("%Y-%m-%dT%H:%M:%SZ")}
        return (200, json.dumps(action)) if noticed else (404, "")

    cloud, calls = Cloud(answer), tmp_path / "calls.json"
    with watching(cloud, "aws", tmp_path, recording(calls)) as process:
        cloud.wait_for(8)
        cloud.noticed = True
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert "AWS will stop this spot instance" in log


def test_a_drain_that_fails_is_repeated(tmp_path):
    cloud, calls = Cloud(compute_engine), tmp_path / "calls.json"
    cloud.noticed = True
    with watching(cloud, "gcp", tmp_path, recording(calls, failures=2)) as process:
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert len(json.loads(calls.read_text())) == 3
    assert log.count("`ray drain-node` failed: no GCS") == 2


def test_without_ray_it_ends_with_a_fault_when_the_time_is_over(tmp_path):
    def answer(request: BaseHTTPRequestHandler, noticed: bool) -> Answer:
        if request.command == "PUT":
            return 200, "secret"
        return 200, json.dumps({"action": "terminate", "time": instant(-5).strftime("%Y-%m-%dT%H:%M:%SZ")})

    cloud = Cloud(answer)
    with watching(cloud, "aws", tmp_path, "raise SystemExit(3)") as process:
        (tmp_path / "bin" / "ray").unlink()
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "`ray drain-node` failed" in log


def test_an_unknown_cloud_is_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--cloud", "oracle"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'oracle'" in done.stderr
