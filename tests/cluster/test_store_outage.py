"""A run whose checkpoints, records, lease and shards are all in an object store that is away for 90 s."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refinedet.pipeline.drills.bench import SPEC, STEPS_AN_EPOCH, Bench
from refinedet.pipeline.runs import storage
from refinedet.pipeline.training.checkpoint import MANIFEST
from safetensors.torch import load

from tests.data.test_remote import Store

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]

OUTAGE_S = 90
EPOCHS = 12
TRAINING = {"epochs": EPOCHS, "decay_epochs": [10], "checkpoint_every_steps": 8}


class Relay:
    """A port that leads to a store, until it is closed: connections end, and new ones are refused."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    def open(self) -> None:
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        out_reader, out_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, out_writer}
        await asyncio.gather(self._copy(reader, out_writer), self._copy(out_reader, writer))
        self._writers -= {writer, out_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()


@pytest.fixture
def relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    pytest.importorskip("moto", reason="needs moto's S3 server")
    (tmp_path / "empty").mkdir()
    store = Store()
    store.start(tmp_path / "empty")
    relay = Relay(store.port)
    relay.open()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield relay
    relay.close()
    store.kill()
    s3fs.S3FileSystem.clear_instance_cache()


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()] if storage.exists(path) else []


def manifests(run: str) -> list[str]:
    found = storage.list_folder(f"{run}/checkpoints")
    return [f"{run}/checkpoints/{checkpoint}/{MANIFEST}" for checkpoint in found]


def test_a_store_that_is_away_costs_no_step(relay: Relay, tmp_path: Path) -> None:
    name = "away"
    spec = {"name": name, "runs": "s3://bucket/runs"} | {section: dict(SPEC[section]) for section in SPEC}
    spec["data"]["shards"] = "s3://bucket/shards"
    spec["training"] |= TRAINING
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    output = tmp_path / "output"
    with output.open("w") as file:
        job = subprocess.Popen(
            [sys.executable, "-m", "refinedet.pipeline.cli", "launch", str(path), "--stages", "prepare,train"],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)},
            start_new_session=True,
        )
    try:
        run = f"s3://bucket/runs/{name}"
        deadline = time.monotonic() + 300
        while not any(storage.exists(manifest) for manifest in manifests(run)):
            assert job.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
        relay.close()
        time.sleep(OUTAGE_S)
        assert job.poll() is None, output.read_text()
        relay.open()
        assert job.wait(600) == 0, output.read_text()
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()
    text = output.read_text()
    assert "Traceback" not in text, text
    steps = [line["step"] for line in lines(f"{run}/metrics.jsonl") if "losses" in line]
    assert steps == list(range(1, EPOCHS * STEPS_AN_EPOCH + 1)), "each once, none of them lost"
    assert "training waits" in " ".join(text.split()), text

    undisturbed = Bench(tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    try:
        assert undisturbed.finish(undisturbed.write_spec(name, training=TRAINING)).process.returncode == 0
        expected = load((undisturbed.run(name) / "weights.safetensors").read_bytes())
    finally:
        undisturbed.close()
    weights = load(storage.read_bytes(f"{run}/weights.safetensors"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
