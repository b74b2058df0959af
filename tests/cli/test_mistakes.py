"""Mistakes over all commands: status 2, one sentence, no traceback, before Ray starts and before MLflow has a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.cli.main import main
from refinedet.pipeline.cluster import session

from tests.cli.mistakes import MISTAKES, write_files

AS_PROCESSES = [
    ["launch", "quickstart", "runs=out", "tracking.uri=http://127.0.0.1:1"],
    ["serve", "nowhere"],
    ["predict", "cut.safetensors", "photo.png"],
    ["report", "nowhere"],
    ["plan", "quickstart", "training.epochs=-1"],
    ["init", "empty"],
]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector's directory."""
    folder = tmp_path_factory.mktemp("detector") / "whole"
    config = RefineDetConfig(num_classes=2, input_size=64, backbone="resnet18", tcb_channels=8)
    RefineDet(config).save_pretrained(folder)
    return folder


@pytest.fixture
def here(detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path)
    (tmp_path / "whole").symlink_to(detector)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_there_are_sixty_and_every_command_is_among_them() -> None:
    assert len(MISTAKES) >= 60
    assert len({tuple(arguments) for arguments, _ in MISTAKES}) == len(MISTAKES)
    commands = "launch submit status render plan schema shard init data predict serve export report compare evaluate"
    assert {*commands.split(), "multiscale", "drill"} <= {arguments[0] for arguments, _ in MISTAKES}


def check(status: int, error: str, said: str) -> None:
    lines = [line for line in error.splitlines() if line.strip()]
    assert status == 2, error
    assert len(lines) == 1, error
    assert lines[0].startswith("refinedet: ")
    assert len(lines[0]) < 600
    assert "Traceback" not in error
    assert said in lines[0]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=lambda value: " ".join(value)[:60] if value else "")
def test_a_mistake_is_one_sentence_before_anything_starts(
    arguments: list[str], said: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(session, "local_node", started)
    monkeypatch.setattr(sys, "argv", ["refinedet", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    check(end.value.code if isinstance(end.value.code, int) else 0, capfd.readouterr().err, said)
    assert not list(here.rglob("mlflow.db")) or "tracking" in said


@pytest.mark.parametrize("arguments", AS_PROCESSES, ids=lambda value: " ".join(value)[:60])
def test_a_process_ends_the_same(arguments: list[str], here: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "refinedet.pipeline.cli", *arguments]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    check(done.returncode, done.stderr, next(said for known, said in MISTAKES if known == arguments))


def test_the_answer_does_not_wait_for_torch(here: Path) -> None:
    """Torch takes seconds to load."""
    code = """
import contextlib, io, sys
from refinedet.pipeline.cli.main import main
from tests.cli.mistakes import MISTAKES
for arguments, _ in MISTAKES:
    sys.argv = ["refinedet", *arguments]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        main()
    if "torch" in sys.modules:
        sys.exit(f"torch was loaded for {' '.join(arguments)}")
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
