"""Every server and path under two hundred hostile requests: 4xx in one sentence, bounded memory, right boxes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.data.images import decode_image
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.tracking.packaging import package_model

from tests.cluster.hostile_requests import Hostile, hostile_requests, photo, text

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
MAX_MB = 1500
CONFIG = RefineDetConfig(num_classes=3, input_size=128, backbone="resnet18", tcb_channels=32, score_threshold=0.0)


@dataclass
class Server:
    """A server in processes of its own; `peak` is their memory when it was most, shared pages counted once."""

    process: subprocess.Popen
    url: str
    is_mlflow: bool
    peak: dict[str, int] = field(default_factory=dict)

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.1):
            self.peak = max(self.peak, self.memory(), key=lambda memory: sum(memory.values()))

    def memory(self) -> dict[str, int]:
        """Proportional set size of each process of the tree, in MB."""
        found = {}
        for one in (process := psutil.Process(self.process.pid), *process.children(recursive=True)):
            try:
                name = " ".join(one.cmdline()).strip()
                found[f"{name} ({one.pid})"] = round(one.memory_full_info().pss / 1e6)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    model = RefineDet(CONFIG, categories=["a", "b", "c"]).eval()
    model.save_pretrained(directory)
    package_model(
        str(directory / "packaged"),
        config=CONFIG,
        weights=str(directory / "model.safetensors"),
        categories=[{"id": 10 * number, "name": name} for number, name in enumerate("abc", 1)],
    )
    return directory


@pytest.fixture(params=["/predict", "/invocations", "mlflow"])
def server(request: pytest.FixtureRequest, detector: Path, tmp_path: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path, ready = request.param, "/health"
    if path == "/predict":
        command = ["refinedet.pipeline.cli", "serve", str(detector), "--precision", "fp32", "--device", "cpu"]
    elif path == "/invocations":
        command = ["refinedet.pipeline.cli", "serve", str(detector / "packaged"), "--precision", "fp32"]
    else:
        command = ["mlflow", "models", "serve", "--model-uri", str(detector / "packaged"), "--env-manager", "local"]
        path, ready = "/invocations", "/ping"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(port)],
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            start_new_session=True,
        )
    ended = threading.Event()
    found = Server(process, f"http://127.0.0.1:{port}{path}", is_mlflow=request.param == "mlflow")
    try:
        deadline = time.monotonic() + 180
        while not _answers(f"http://127.0.0.1:{port}{ready}"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        watch = threading.Thread(target=found.watch, args=(ended,))
        watch.start()
        yield found
    finally:
        ended.set()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def send(server: Server, hostile: Hostile) -> tuple[int, str]:
    headers = {"Content-Type": hostile.content_type} if hostile.content_type is not None else {}
    answer = requests.post(server.url, data=hostile.body, headers=headers, timeout=120)
    return answer.status_code, answer.text


def predict(server: Server, document: dict[str, Any]) -> dict[str, Any]:
    """The answer about the one image of a request."""
    answer = requests.post(server.url, json=document | {"params": {"score_threshold": 0.2}}, timeout=60)
    assert answer.status_code == 200, (list(document), answer.text)
    (row,) = answer.json()["predictions"]
    return row


def other_forms(image: str) -> list[dict[str, Any]]:
    """The standard forms of MLflow's servers, beside `inputs` as rows."""
    rows = [{"image": image}]
    split = {"columns": ["image"], "index": [0], "data": [[image]]}
    return [
        {"instances": rows},
        {"dataframe_records": rows},
        {"dataframe_split": split},
        {"inputs": {"image": [image]}},
    ]


def test_hostile_requests_are_refused_and_the_server_lives(server: Server, detector: Path) -> None:
    files = {suffix: photo(suffix) for suffix in (".jpg", ".png", ".webp")}
    before = sum(server.memory().values())
    with ThreadPoolExecutor(4) as pool:
        wanted = hostile_requests()
        answers = list(pool.map(lambda hostile: send(server, hostile), wanted))
    peak = sum(server.peak.values())
    # Ray's own services beside the server take no request, and there are as many on a cluster without one.
    services = ("/ray/", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
    serving = sum(size for name, size in server.peak.items() if not any(service in name for service in services))
    memory = ", ".join(f"{size} {name[-60:]}" for name, size in server.peak.items() if size > 40)
    sys.stderr.write(f"\n{server.url}: {before} MB before, at most {peak}, the server {serving} MB: {memory}\n")
    for hostile, (status, said) in zip(wanted, answers, strict=True):
        if hostile.unparsed and server.is_mlflow:
            assert (status, said) == (500, "Internal Server Error") or 400 <= status < 500, hostile.what
        else:
            assert 400 <= status < 500, (hostile.what, status, said[:200])
        assert "Traceback" not in said, hostile.what
        assert 'File "' not in said, (hostile.what, said[:500])
        if not server.is_mlflow:
            assert list(json.loads(said)) == ["error"], hostile.what
            assert len(said) < 400, hostile.what
    assert serving < MAX_MB
    assert peak - before < MAX_MB / 3
    predictor = Predictor.load(str(detector), device="cpu", precision="fp32")
    scale = 1 if server.url.endswith("/predict") else 10  # the data set's own ids travel with the packaged model
    for suffix, content in files.items():
        row = predict(server, {"inputs": [{"image": text(content)}]})
        assert all(predict(server, document) == row for document in other_forms(text(content)))
        pixels, _ = decode_image(content)
        assert pixels is not None
        (found,) = predictor.predict([pixels])
        kept = found.scores >= 0.2
        assert kept.any()
        assert row["labels"] == (scale * found.labels[kept]).tolist()
        np.testing.assert_allclose(row["boxes"], found.boxes[kept].numpy(), atol=1e-4, err_msg=suffix)
        np.testing.assert_allclose(row["scores"], found.scores[kept].numpy(), atol=1e-4)
