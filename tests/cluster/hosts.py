"""Real Ray clusters for tests, with token authentication: one host, or two that only a network joins.

The two hosts are network namespaces joined by a veth pair; a second pair joins the first of them to this process, as a
laptop is joined to a cluster's head. They share the machine's processes and files, a directory is their shared storage.
Every cluster has its own ports, directory and token, and nothing is left of it, however the test ends.

    with two_hosts(tmp_path) as cluster:
        cluster.outside("submit", "job.yaml", "--address", cluster.dashboard)   # refinedet, as on a laptop
        cluster.kill(cluster.worker)
        cluster.start(cluster.worker)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_START_S = 60.0
_ATTEMPTS = 3
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 200 * 2**20
_RAYLET = "raylet/raylet"
_PR_SET_PDEATHSIG = 1
_HEAD_ADDRESS, _WORKER_ADDRESS = "10.77.0.1", "10.77.0.2"


@dataclass
class Host:
    """A machine of the cluster; `namespace` None: this machine's own network."""

    name: str
    address: str
    namespace: str | None
    num_cpus: int
    resources: str | None = None
    """further resources as JSON, as `ray start --resources` takes them"""
    labels: str | None = None
    process: subprocess.Popen | None = None
    starts: int = 0

    @property
    def node_name(self) -> str:
        """Another at every start: Ray remembers dead nodes, and takes a while to find that they are dead."""
        return f"{self.name}-{self.starts}"

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs in this host's network."""
        return ["ip", "netns", "exec", self.namespace, *arguments] if self.namespace else list(arguments)

    def start_command(self, *arguments: str) -> list[str]:
        """The same, ahead of what else the machine does where we may: Ray gives its parts 15 s to start."""
        return self.command(*(("nice", "-n", "-5") if os.geteuid() == 0 and shutil.which("nice") else ()), *arguments)

    def processes(self) -> list[psutil.Process]:
        """All that runs on the host: of the namespace, or below `ray start` where there is none."""
        if self.namespace:
            shown = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True).stdout
            pids = [int(pid) for pid in shown.split()]
            return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.process is not None:
                parent = psutil.Process(self.process.pid)
                return [parent, *parent.children(recursive=True)]
        return []

    def raylet(self) -> psutil.Process:
        """The process that is this node, to Ray."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if _RAYLET in process.cmdline()[0]:
                    return process
        raise AssertionError(f"no raylet runs on {self.name}")


@dataclass
class RayCluster:
    """Hosts that run Ray, and how to reach them."""

    hosts: list[Host]
    outside_address: str
    ports: dict[str, int]
    node_environment: Mapping[str, str] = field(default_factory=dict)
    """further environment of the nodes, and so of the jobs there"""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    # In /tmp, which is short: names of sockets are limited to 107 bytes.
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rd-", dir="/tmp")))

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def worker(self) -> Host:
        return self.hosts[1]

    @property
    def gcs(self) -> str:
        """HOST:PORT for `refinedet launch --address`, on a host of the cluster."""
        return f"{self.head.address}:{self.ports['gcs']}"

    @property
    def dashboard(self) -> str:
        """http://HOST:PORT for `refinedet submit --address`, from outside."""
        return f"http://{self.outside_address}:{self.ports['dashboard']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a client with the token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, host: Host) -> None:
        """Start Ray on a host, or bring a host back that was killed; returns once the node has joined."""
        environment = {
            **self.environment,
            # Commands of a job find this interpreter, as they find an image's.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_agent_register_timeout_ms": "120000",  # the default, 30 s, is short on a busy machine
            "RAY_health_check_period_ms": "1000",  # a dead node is seen after 5 s, not 20
            "RAY_metrics_report_interval_ms": "1000",
            **({"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"} if host.namespace else {}),
            **self.node_environment,
        }
        log = self.folder / f"{host.name}.log"
        for _ in range(_ATTEMPTS):
            host.starts += 1
            command = host.start_command(*self._ray_start(host))
            with open(log, "ab") as file:
                host.process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    cwd=self.folder,
                    start_new_session=True,
                    preexec_fn=_die_with_the_parent,
                )
            if self._comes_up(host):
                return
            self._end(host.processes())
        raise AssertionError(f"Ray did not start on {host.name}: {log.read_text()[-3000:]}")

    def kill(self, host: Host) -> None:
        """Take a host away as a power cut does: its raylet first, so that Ray cannot sign off, then all else."""
        running = host.processes()
        host.raylet().kill()
        self._end(running)
        if host.process is not None:
            host.process.wait(30)

    def inside(self, host: Host, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        """Run a command on a host of the cluster, with its token."""
        defaults = {"env": self.environment, "capture_output": True, "text": True, "timeout": 240}
        return subprocess.run(host.command(*arguments), **(defaults | options))

    def outside(self, *arguments: str, token: str | None = None, **options) -> subprocess.CompletedProcess[str]:
        """Run `refinedet` as on a laptop that reaches the dashboard, and nothing else of the cluster."""
        defaults = {"env": self._client(token), "capture_output": True, "text": True, "timeout": 240}
        return subprocess.run([sys.executable, "-m", "refinedet.pipeline.cli", *arguments], **(defaults | options))

    def begin_outside(self, *arguments: str, output: Path) -> subprocess.Popen:
        """The same, without waiting; stdout and stderr go to a file."""
        command = [sys.executable, "-m", "refinedet.pipeline.cli", *arguments]
        with open(output, "wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self._client(None))

    def close(self) -> None:
        """End every process of the cluster."""
        self._end([process for host in self.hosts for process in host.processes()])
        for host in self.hosts:
            if host.process is not None:
                host.process.wait(30)

    def _client(self, token: str | None) -> dict[str, str]:
        return self.environment | ({"RAY_AUTH_TOKEN": token} if token else {})

    def _ray_start(self, host: Host) -> Sequence[str]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--node-ip-address={host.address}", f"--node-name={host.node_name}", f"--num-cpus={host.num_cpus}"),
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            # One directory each: in a shared directory a node deletes the code of jobs that run on the other.
            f"--temp-dir={self.folder / host.name}",
        ]
        for option, value in (("resources", host.resources), ("labels", host.labels)):
            if value:
                command.append(f"--{option}={value}")
        if host is not self.head:
            return [*command, f"--address={self.gcs}"]
        return [
            *(*command, "--head", f"--port={self.ports['gcs']}", f"--ray-client-server-port={self.ports['client']}"),
            *("--dashboard-host=0.0.0.0", f"--dashboard-port={self.ports['dashboard']}"),
            f"--dashboard-agent-listen-port={self.ports['agent']}",
        ]

    @staticmethod
    def _end(running: list[psutil.Process]) -> None:
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=30)

    def _comes_up(self, host: Host) -> bool:
        """Ray gives its parts 15 and 30 s to start, which a busy machine may need more than once."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            assert host.process is not None
            if host.process.poll() is not None:
                return False
            if self._is_up(host):
                return True
            time.sleep(_POLL_S)
        return False

    def _is_up(self, host: Host) -> bool:
        """The node is alive to the dashboard's head."""
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes?limit=100")
        request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                text = answer.read().decode()
        except (OSError, urllib.error.URLError):
            return False
        nodes = json.loads(text)["data"]["result"]["result"]
        return any(node["node_name"] == host.node_name and node["state"] == "ALIVE" for node in nodes)


def _die_with_the_parent() -> None:
    """A test that is killed cannot clean up: `ray start` goes with it, and its reaper takes the rest."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _sweep() -> None:
    """Remove the namespaces of tests that were killed."""
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        name = line.split()[0] if line.split() else ""
        owner = re.fullmatch(r"rd-(?:head|worker)-(\d+)-[0-9a-f]+", name)
        if owner and not psutil.pid_exists(int(owner.group(1))):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def reason_against_two_hosts() -> str | None:
    """The reason why this machine cannot play two hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs `ip` (Debian's package iproute2), which is not installed"
    name = f"rd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"may not make network namespaces: {made.stderr.strip()}"
    try:
        first, second = f"rp{os.getpid()}a", f"rp{os.getpid()}b"
        pair = ["ip", "link", "add", first, "netns", name, "type", "veth", "peer", "name", second, "netns", name]
        made = subprocess.run(pair, capture_output=True, text=True)
        return f"may not make veth pairs: {made.stderr.strip()}" if made.returncode else None
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def one_host(
    *,
    num_cpus: int = 2,
    resources: str | None = None,
    labels: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RayCluster]:
    """A head node on this machine; `environment` is what its jobs see beside this process's."""
    host = Host("head", _own_address(), None, num_cpus, resources, labels)
    ports = _free_ports("gcs", "client", "dashboard", "agent")
    with _running(RayCluster([host], host.address, ports, environment or {})) as cluster:
        yield cluster


@contextlib.contextmanager
def two_hosts(
    *, head_cpus: int = 1, worker_cpus: int = 1, worker: Mapping[str, str] | None = None
) -> Iterator[RayCluster]:
    """A head and a worker node on hosts of their own. Call `reason_against_two_hosts` before.

    worker  further fields of the worker's `Host`: resources, labels
    """
    tag = f"{os.getpid()}-{secrets.token_hex(2)}"
    link = f"rd{secrets.token_hex(3)}"  # 15 characters at most
    network = f"10.77.{1 + os.getpid() % 250}"
    head = Host("head", _HEAD_ADDRESS, f"rd-head-{tag}", head_cpus)
    other = Host("worker", _WORKER_ADDRESS, f"rd-worker-{tag}", worker_cpus, **(worker or {}))
    a, b = head.namespace, other.namespace
    assert a is not None
    assert b is not None
    _sweep()
    try:
        for namespace in (a, b):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        _ip("link", "add", link, "type", "veth", "peer", "name", "outside", "netns", a)
        for namespace, address, device in ((a, f"{_HEAD_ADDRESS}/24", "eth0"), (b, f"{_WORKER_ADDRESS}/24", "eth0")):
            _ip("-n", namespace, "address", "add", address, "dev", device)
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", a, "address", "add", f"{network}.1/30", "dev", "outside")
        _ip("-n", a, "link", "set", "outside", "up")
        _ip("address", "add", f"{network}.2/30", "dev", link)
        _ip("link", "set", link, "up")
        ports = {"gcs": 6379, "client": 10001, "dashboard": 8265, "agent": 52365}
        with _running(RayCluster([head, other], f"{network}.1", ports)) as cluster:
            yield cluster
    finally:
        for namespace in (a, b):  # their devices go with them
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@contextlib.contextmanager
def _running(cluster: RayCluster) -> Iterator[RayCluster]:
    try:
        for host in cluster.hosts:
            cluster.start(host)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(cluster.folder, ignore_errors=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"


def _own_address() -> str:
    """The one that Ray takes for 127.0.0.1: the address towards the outside. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _free_ports(*names: str) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
