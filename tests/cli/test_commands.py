"""The command `refinedet`: how it starts, how it ends, and what runs where Ray is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refinedet.pipeline.cli.main import app

# Ray, DeepSpeed and MLflow as if they were not installed: importing one fails.
WITHOUT_RAY = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("ray", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from refinedet.pipeline.cli.main import main
main()
"""


def run(*arguments: str, cwd: Path, without_ray: bool = False) -> subprocess.CompletedProcess[str]:
    program = ["-c", WITHOUT_RAY] if without_ray else ["-m", "refinedet.pipeline.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_version_is_the_installed_one(tmp_path: Path) -> None:
    import importlib.metadata

    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, importlib.metadata.version("refinedet"))


def test_help_lists_every_command_and_starts_nothing_heavy(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    names = "launch submit resume status list logs stop render plan doctor schema shard data predict report evaluate"
    for name in f"{names} multiscale serve drill".split():
        assert f"\n  {name} " in done.stdout
    assert "..." not in done.stdout.replace("[ARGS]...", ""), "a line of help is cut"
    program = (
        "import sys, refinedet.pipeline.cli.main; print(*sorted({'ray', 'torch', 'mlflow', 'cv2'} & {*sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert loaded.stdout.split() == []


def test_help_holds_one_sentence_for_every_command() -> None:
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:  # type: ignore[union-attr]
            assert command.callback is not None
            assert (command.callback.__doc__ or "").strip(), command.callback.__name__


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "quickstart"],
        ["plan", "ablation/table2_1_full", "--nodes", "1"],
        ["schema"],
        ["shard", "quickstart", "data.train=[{count: 3}]", "data.val=[{count: 2}]"],
        ["evaluate", "--detections", "found.json", "--annotations", "truth.json"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_needs_no_cluster_runs_without_ray(arguments: list[str], tmp_path: Path) -> None:
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}
    truth = {
        "images": [{"id": 1, "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [box | {"id": 1, "area": 16, "iscrowd": 0}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([box | {"score": 0.5}]))
    done = run(*arguments, cwd=tmp_path, without_ray=True)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "shard":
        shards = str(tmp_path / "runs" / "quickstart" / "shards" / "train")
        seen = ["data", "show", "quickstart", "--output", str(tmp_path / "seen.png")]
        for each in (["data", "check", shards], seen, ["data", "stats", "quickstart"]):
            done = run(*each, cwd=tmp_path, without_ray=True)
            assert done.returncode == 0, done.stderr
        assert (tmp_path / "seen.png").stat().st_size


def test_the_doctor_misses_ray_in_a_sentence(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path, without_ray=True)
    assert "Traceback" not in done.stderr
    assert "operators" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "nowhere.yaml"], "There is no job spec 'nowhere.yaml'"),
        (["plan", "."], "cannot be read"),
        (["plan", "coco_mini"], "data.root datasets/coco-mini does not exist: give the directory of the data set"),
        (["data", "check", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "--detections", "nowhere.json", "--annotations", "nowhere.json"], "nowhere.json"),
        (["evaluate"], "takes either"),
        (["predict", "nowhere", __file__, "--output", "seen"], "nowhere"),
        (["launch", "quickstart", "runs=/proc/none"], "/proc/none/quickstart cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_about_files_is_one_sentence_and_status_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("refinedet: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"
