"""The lease on a run: one owner, whatever the store; a dead owner keeps nothing; a paused one finds out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.lease import Lease

TTL_S = 1.5

HOLD = """
import sys
from refinedet.pipeline.runs.lease import Lease
with Lease(sys.argv[1], lambda said: print("lost", flush=True), ttl_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    changes = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # one of other tests has other credentials
        fs, _ = storage.filesystem("s3://runs")
        fs.mkdir("runs")
        yield "s3://runs"
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = uuid.uuid4().hex[:8]
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{name}"
    return str(tmp_path / name) if request.param == "local" else f"memory://runs/{name}"


def rewrite(run: str, **changes: Any) -> None:
    """Change the file of the present owner."""
    directory = storage.join(run, "lease")
    file = storage.join(directory, storage.list_folder(directory)[-1])
    storage.write_json(file, storage.read_json(file) | changes)


def wait_for(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_file_is_created_by_one_of_many(run: str) -> None:
    wins: list[int] = []
    gate = threading.Barrier(8)

    def create(number: int) -> None:
        gate.wait()
        if storage.create(storage.join(run, "file"), str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not run.startswith("memory"):  # fsspec's store in memory is one dict without a lock
        assert len(wins) == 1
        assert storage.read_bytes(storage.join(run, "file")) == str(wins[0]).encode()
    assert not storage.create(storage.join(run, "file"), b"later")


def test_one_process_holds_a_run_and_gives_it_back(run: str) -> None:
    for _ in range(3):
        with Lease(run), pytest.raises(UserError, match=f"in use by process {os.getpid()}"), Lease(run):
            pass
    assert len(storage.list_folder(storage.join(run, "lease"))) == 1, "earlier owners leave nothing"


def test_an_owner_elsewhere_that_gives_signs_of_life_is_not_disturbed(run: str) -> None:
    with Lease(run, ttl_s=TTL_S):
        rewrite(run, machine="elsewhere")
        stop = threading.Event()

        def live() -> None:
            beat = 100
            while not stop.wait(TTL_S / 6):
                beat += 1
                rewrite(run, machine="elsewhere", beat=beat)

        thread = threading.Thread(target=live)
        thread.start()
        with pytest.raises(UserError, match="is in use"), Lease(run, ttl_s=TTL_S):
            pass
        stop.set()
        thread.join()


def test_a_silent_owner_elsewhere_loses_the_run_after_its_time(run: str) -> None:
    storage.write_json(storage.join(run, "lease", "00000007.json"), owner(renewed=time.time()))
    began = time.monotonic()
    with Lease(run, ttl_s=TTL_S):
        assert time.monotonic() - began >= TTL_S
        assert storage.list_folder(storage.join(run, "lease")) == ["00000008.json"]


@pytest.mark.parametrize("skew_s", [-3000.0, -30.0, 30.0, 1e6])
def test_clocks_that_differ_take_no_run_from_the_living(tmp_path: Path, skew_s: float) -> None:
    """Only an owner whose clock is ten minutes behind may be taken for dead, and finds out at its next renewal."""
    lease = tmp_path / "lease"
    lease.mkdir()
    file = lease / "00000001.json"
    file.write_text(json.dumps(owner(renewed=time.time() + skew_s)))
    stop = threading.Event()

    def live() -> None:
        beat = 0
        while not stop.wait(TTL_S / 6):
            beat += 1
            if file.exists():
                storage.write_json(str(file), owner(renewed=time.time() + skew_s, beat=beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with Lease(str(tmp_path), ttl_s=TTL_S):
            assert skew_s < -600
    except UserError:
        assert skew_s >= -600
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_a_garbled_lease_is_waited_for_and_replaced(tmp_path: Path, content: bytes) -> None:
    storage.write_bytes(str(tmp_path / "lease" / "00000001.json"), content)
    with Lease(str(tmp_path), ttl_s=0.3):
        pass


def test_of_many_that_want_a_dead_owners_run_one_gets_it(run: str) -> None:
    storage.write_json(storage.join(run, "lease", "00000001.json"), owner(renewed=0.0))
    held: list[int] = []
    gate, done = threading.Barrier(6), threading.Event()

    def take(number: int) -> None:
        gate.wait()
        try:
            with Lease(run):
                held.append(number)
                done.wait(60)
        except UserError:
            held.append(-1)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(held) == 6)
    done.set()
    for thread in threads:
        thread.join()
    if not run.startswith("memory"):
        assert sum(number >= 0 for number in held) == 1


def test_a_killed_owner_on_this_machine_holds_nothing_and_a_paused_one_finds_out(tmp_path: Path) -> None:
    run = str(tmp_path)
    with holder(run) as first:
        first.kill()
        first.wait()
        began = time.monotonic()
        with holder(run) as second:
            assert time.monotonic() - began < 20, "not after the silence of an owner elsewhere"
            second.send_signal(signal.SIGSTOP)
            rewrite(run, machine="elsewhere")  # as another machine sees it
            with Lease(run, ttl_s=TTL_S):
                second.send_signal(signal.SIGCONT)
                assert second.stdout is not None
                assert second.stdout.readline() == "lost\n"


class holder:
    """A process that holds a run."""

    def __init__(self, run: str) -> None:
        command = [sys.executable, "-c", HOLD, run, "6"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def owner(**changes: Any) -> dict[str, Any]:
    """An owner on another machine."""
    return {
        "token": "t",
        "host": "h",
        "machine": "elsewhere",
        "pid": 1,
        "started": "0",
        "beat": 0,
        "renewed": 0.0,
    } | changes
