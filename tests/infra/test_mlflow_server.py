"""The MLflow server of infra/mlflow for real: PostgreSQL, an S3-like store, a login, a run, and an outage."""

from __future__ import annotations

import base64
import contextlib
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.tracking.runs import RunTracker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
_START_S = 240
INFRA = Path(__file__).resolve().parents[2] / "infra"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _program(name: str) -> str | None:
    places = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return places[-1] if places else shutil.which(name)


def _wait(what: str, ready, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{what} ended: {log.read_text()[-3000:]}"
        with contextlib.suppress(OSError):
            if ready():
                return
        time.sleep(0.2)
    raise AssertionError(f"{what} did not start in {_START_S} s: {log.read_text()[-3000:]}")


@contextlib.contextmanager
def _running(what: str, command: list[str], ready, log: Path, environment=None) -> Iterator[subprocess.Popen]:
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | (environment or {}), start_new_session=True
        )
    try:
        _wait(what, ready, process, log)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def _answers(url: str):
    def ready() -> bool:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200

    return ready


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # PostgreSQL runs as a user of its own
    return folder


@pytest.fixture(scope="module")
def database(folder) -> Iterator[str]:
    """A PostgreSQL of our own; its URI."""
    if not all(_program(name) for name in ("initdb", "postgres", "createdb")):
        pytest.skip("needs PostgreSQL (Debian's package postgresql), which is not installed")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs psycopg2-binary, which is not installed")
    data = folder / "postgres"
    data.mkdir(mode=0o700)
    become: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(data, "postgres", "postgres")
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    initialise = [
        *become,
        str(_program("initdb")),
        "--pgdata",
        str(data),
        "--auth=trust",
        "--username=mlflow",
        "--no-sync",
    ]
    subprocess.run(initialise, check=True, capture_output=True)
    port = _free_port()
    command = [*become, str(_program("postgres")), "-D", str(data), "-p", str(port), "-k", str(data), "-h", "127.0.0.1"]

    def ready() -> bool:
        done = subprocess.run([str(_program("pg_isready")), "-h", "127.0.0.1", "-p", str(port)], capture_output=True)
        return done.returncode == 0

    with _running("PostgreSQL", command, ready, folder / "postgres.log"):
        create = [str(_program("createdb")), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        subprocess.run(create, check=True, capture_output=True)
        yield f"postgresql://mlflow@127.0.0.1:{port}/mlflow"


@pytest.fixture(scope="module")
def store(folder) -> Iterator[dict[str, str]]:
    """An S3-like store with a bucket; the environment that reaches it."""
    pytest.importorskip("moto.server", reason="needs moto[server], which is not installed")
    import boto3

    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "MLFLOW_S3_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running("the store", command, _answers(f"{url}/moto-api/"), folder / "store.log"):
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="mlflow")
        yield environment


_LOGIN = ("admin", "correct horse battery")


def _server(database: str, store: dict[str, str], folder: Path, port: int):
    """The command of infra/mlflow/Dockerfile with the environment of compose.yaml."""
    uri = database.replace("postgresql://", "postgresql+psycopg2://")
    config = yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())["configs"]["auth"]["content"]
    auth = folder / "auth.ini"
    auth.write_text(re.sub(r"database_uri = .*", f"database_uri = {uri}", config))
    image = (INFRA / "mlflow" / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", image, re.MULTILINE)
    _, *arguments = json.loads(command)
    arguments = ["127.0.0.1" if word == "0.0.0.0" else str(port) if word == "5000" else word for word in arguments]
    environment = store | {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow/",
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_AUTH_ADMIN_PASSWORD": _LOGIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the test",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    whole = [sys.executable, "-m", "mlflow", *arguments, "--workers", "1"]
    return _running("MLflow", whole, _answers(f"http://127.0.0.1:{port}/health"), folder / "mlflow.log", environment)


def _status(url: str, login: tuple[str, str] | None = None) -> int:
    request = urllib.request.Request(url)
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_login_nothing_is_answered_but_that_the_server_is_there(database, store, folder):
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF (mlflow[auth]), which is not installed")
    port = _free_port()
    runs = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
    with _server(database, store, folder, port):
        assert _status(f"http://127.0.0.1:{port}/health") == 200
        assert _status(runs) == 401
        assert _status(runs, ("admin", "guessed it")) == 401
        assert _status(runs, _LOGIN) == 200


def test_a_run_is_held_by_postgresql_and_the_store_through_an_outage(database, store, folder, caplog, monkeypatch):
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF (mlflow[auth]), which is not installed")
    import boto3
    import psycopg2

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", _LOGIN[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", _LOGIN[1])

    port = _free_port()
    runs = folder / "runs"
    spec = Tracking(uri=f"http://127.0.0.1:{port}", experiment="held")
    with _server(database, store, folder, port):
        tracker = RunTracker(spec, name="job", run_dir=str(runs / "job"), runs=str(runs))
        tracker.log_spec({"name": "job", "training": {"epochs": 3}})
        tracker.log_dataset("shapes", "d" * 64, context="training", source="s3://bucket/shards", num_samples=5)
        tracker.log_metrics(1, {"loss/total": 3.0})
        assert tracker.flush()
    tracker.log_metrics(2, {"loss/total": 2.0})  # no server answers
    time.sleep(5)
    with _server(database, store, folder, port):
        tracker.log_metrics(3, {"loss/total": 1.0})
        report = runs / "job" / "report.html"
        report.write_text("<h1>job</h1>")
        tracker.log_artifact(str(report))
        assert tracker.finish("FINISHED", timeout_s=120)
        again = RunTracker(spec, name="job", run_dir=str(runs / "job"), runs=str(runs))
        assert again.resumed
        assert again.finish("KILLED", "asked to stop")
    assert "does not answer; the run continues" in caplog.text

    with contextlib.closing(psycopg2.connect(database)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT step, value FROM metrics WHERE key = 'loss/total' ORDER BY step")
        assert cursor.fetchall() == [(1, 3.0), (2, 2.0), (3, 1.0)]
        cursor.execute("SELECT run_uuid, status FROM runs WHERE name = 'job'")
        assert cursor.fetchall() == [(tracker.run_id, "KILLED")]
        cursor.execute("SELECT value FROM params WHERE key = 'training.epochs'")
        assert cursor.fetchall() == [("3",)]
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    bucket = boto3.client("s3", endpoint_url=store["MLFLOW_S3_ENDPOINT_URL"], **keys)
    stored = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="mlflow").get("Contents", [])]
    assert any(key.endswith("artifacts/report.html") for key in stored)
