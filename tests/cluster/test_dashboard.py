"""Answers that a client meets at an address: other versions, certificates, proxies, something that is no Ray at all."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from refinedet.pipeline.cluster import session
from refinedet.pipeline.cluster.dashboard import CERTIFICATES, HEADERS, cluster_nodes
from refinedet.pipeline.cluster.jobs_client import JobsClient
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs.errors import UserError

NODES = [
    {
        "node_id": "a",
        "node_ip": "127.0.0.1",
        "is_head_node": True,
        "state": "ALIVE",
        "state_message": None,
        "node_name": "a",
        "resources_total": {"CPU": 2.0},
        "labels": {},
    }
]


class FakeDashboard(ThreadingHTTPServer):
    """Answers as a test prescribes, and keeps what it received: (target, headers)."""

    def __init__(self, answers: dict[str, object]) -> None:
        self.answers, self.asked = answers, []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    server: FakeDashboard

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        answer = next((value for path, value in self.server.answers.items() if path in self.path), None)
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def dashboard(version: str = ray.__version__, certificate: Path | None = None, **answers: object) -> Iterator:
    known: dict[str, object] = {"/api/version": {"version": "4", "ray_version": version}} if version else {}
    server = FakeDashboard(known | answers)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", CERTIFICATES, HEADERS):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself, in one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


def refusal(address: str) -> str:
    with pytest.raises(UserError) as refused:
        JobsClient(address)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_nobody_there_and_somebody_else_there_are_told_apart() -> None:
    assert "No Ray cluster answers" in refusal("http://127.0.0.1:1")
    with dashboard(version="", **{"/": "<html>hello</html>"}) as server:
        assert "is no Ray dashboard" in refusal(f"http://127.0.0.1:{server.port}")


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_what_is_for_those_outside_is_no_address_to_launch_on(address: str) -> None:
    with pytest.raises(UserError, match=rf"{address}.*port 6379"), ray_session(Cluster(), address):
        pass


def test_a_machine_that_is_no_node_is_told_where_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("No node info found matching attributes: '10.0.0.9' when trying to resolve node")

    monkeypatch.setattr(session, "check_reachable", lambda address: None)
    monkeypatch.setattr(session.ray, "init", refuse)
    said = r"no node of the cluster at .head:6379.; run launch on a node"
    with pytest.raises(UserError, match=said), ray_session(Cluster(), "head:6379"):
        pass


def test_the_nodes_that_are_alive_are_asked_for() -> None:
    answer = {"result": True, "msg": "", "data": {"result": {"result": NODES, "total": 1, "num_after_truncation": 1}}}
    with dashboard(**{"/api/v0/nodes": answer}) as server:
        (node,) = cluster_nodes(f"http://127.0.0.1:{server.port}")
    assert node.resources == {"CPU": 2.0}
    assert "filter_values=ALIVE" in next(target for target, _ in server.asked if "/nodes" in target)


def test_https_needs_the_authority_that_signed(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard(certificate=certificate) as server:
        address = f"https://127.0.0.1:{server.port}"
        said = refusal(address)
        assert "is not trusted" in said
        assert CERTIFICATES in said
        monkeypatch.setenv(CERTIFICATES, str(certificate))
        JobsClient(address)
    monkeypatch.setenv(CERTIFICATES, "/nowhere.pem")
    assert "/nowhere.pem" in refusal(address)


def test_proxies_and_their_headers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv(HEADERS, '{"Authorization": "Bearer from-a-proxy"}')
        JobsClient("http://cluster.invalid:8265")
    target, headers = proxy.asked[0]
    assert target == "http://cluster.invalid:8265/api/version"
    assert headers["Authorization"] == "Bearer from-a-proxy"
    monkeypatch.setenv(HEADERS, "hunter2")
    said = refusal("http://cluster.invalid:8265")
    assert HEADERS in said
    assert "hunter2" not in said


def test_another_python_on_the_cluster_is_said_before_anything_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refinedet.pipeline.cluster.entrypoint"]
    arguments = ["launch", str(tmp_path / "none.yaml")]
    done = subprocess.run([*command, "3.99", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.stderr.startswith(f"refinedet: the cluster runs Python {here}, the job was submitted from 3.99;")
    same = subprocess.run([*command, here, *arguments], capture_output=True, text=True)
    assert "There is no job spec" in same.stderr
