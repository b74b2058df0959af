"""Ray's cost beside the bare loop: `refinedet launch` against two plain processes, and `submit` to the first step.

    python -m tests.bench.bench_launch [--epochs 10] [--skip-submit] [--json OUT]

One small job, three ways. Bare: the training loop in two processes, as torchrun starts them, on existing shards.
Launch: a local Ray is started, the shards are written, two Ray Train workers train, MLflow records it. Submit: the same
job sent to a cluster that runs, and has run it once before, until its first step is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import one_host

WORKERS = 2
LAUNCH_LIMIT_S, SUBMIT_LIMIT_S = 45.0, 60.0
_TIMEOUT_S = 280.0


def write_spec(folder: Path, name: str, epochs: int) -> Path:
    spec = {
        "name": name,
        "runs": str(folder / "runs"),
        "data": {"format": "shapes", "image_size": 96, "train": [{"count": 32}], "val": [], "loader_workers": 0},
        "model": {
            "num_classes": 10,
            "input_size": 64,
            "backbone": "resnet10t",
            "tcb_channels": 16,
            "prediction_block": False,
        },
        "training": {
            "global_batch": 4,
            "epochs": epochs,
            "reference_batch": 4,
            "learning_rate": 0.002,
            "warmup_learning_rate": 0.0005,
            "decay_epochs": [epochs - 1],
            "precision": "fp32",
        },
        "tracking": {"log_every_steps": 1},
        "cluster": {"workers": WORKERS},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def recorded(run: Path) -> list[dict[str, Any]]:
    """The steps that a run has recorded."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}") and "losses" in line]


def launch(spec: Path, run: Path) -> dict[str, float]:
    """Wall time of `refinedet launch`, and of the steps in it."""
    began = time.time()
    command = [sys.executable, "-m", "refinedet.pipeline.cli", "launch", str(spec), "--stages", "prepare,train"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    took = time.time() - began
    assert done.returncode == 0, done.stdout + done.stderr
    steps = recorded(run)
    first_step = steps[0]["times"]["total"]
    return {
        "wall_s": took,
        "first_step_s": steps[0]["time"] - began,
        "steps_s": steps[-1]["time"] - steps[0]["time"] + first_step,
    }


def bare(spec: Path, shards: Path, output: Path) -> dict[str, float]:
    """Wall time of the loop in plain processes, and of the steps in it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORKERS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench.bench_launch", "--bare", str(spec), str(shards), str(output)]
    began = time.time()
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(WORKERS):
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = stack.enter_context(open(output.with_suffix(f".{rank}.log"), "wb"))
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait(_TIMEOUT_S) for process in processes]
    took = time.time() - began
    assert codes == [0] * WORKERS, output.with_suffix(".0.log").read_text()
    times = json.loads(output.read_text())
    return {
        "wall_s": took,
        "first_step_s": times[0]["end"] - began,
        "steps_s": times[-1]["end"] - times[0]["begin"],
    }


def run_bare(spec_file: str, shards_folder: str, output: str) -> None:
    """One of the plain processes."""
    import functools

    import torch
    from refinedet.model import RefineDet, sum_losses
    from refinedet.pipeline.config.batches import BatchPlan
    from refinedet.pipeline.config.spec_files import load_spec
    from refinedet.pipeline.data.index import open_shards
    from refinedet.pipeline.data.samples import Cursor
    from refinedet.pipeline.data.stream import TrainingStream
    from refinedet.pipeline.training.loop import train
    from refinedet.pipeline.training.records import StepRecord
    from refinedet.pipeline.training.task import Callbacks, Task
    from refinedet.pipeline.training.world import open_world

    spec = load_spec(spec_file)
    shards = open_shards(shards_folder)
    times: list[dict[str, float]] = []

    def observe(record: StepRecord) -> None:
        now = time.time()
        times.append({"begin": now - record.times.total, "end": now})

    with open_world() as world:
        torch.manual_seed(spec.seed)
        detector = RefineDet(spec.model)

        def make_stream(start: Cursor, plan: BatchPlan) -> TrainingStream:
            return TrainingStream(
                shards,
                spec.data,
                input_size=spec.model.input_size,
                seed=spec.seed,
                batch=plan,
                rank=world.rank,
                start=start,
            )

        task = Task(
            detector,
            functools.partial(sum_losses, config=spec.model),
            make_stream,
            run_dir=str(Path(output).with_suffix("")),
            seed=spec.seed,
        )
        train(spec.training, world, task, Callbacks(on_step=observe))
        if world.is_main:
            Path(output).write_text(json.dumps(times))


def submit(folder: Path, epochs: int) -> dict[str, float]:
    """Seconds from `refinedet submit` to the first recorded step, on a cluster that has run the job before."""
    with one_host(num_cpus=WORKERS) as cluster:
        for name in ("warm", "measured"):
            spec, run = write_spec(folder, name, epochs), folder / "runs" / name
            began = time.time()
            submitted = cluster.outside("submit", str(spec), "--address", cluster.dashboard)
            accepted = time.time() - began
            assert submitted.returncode == 0, submitted.stderr
            followed = cluster.outside("logs", name, "--follow", "--address", cluster.dashboard)
            assert followed.returncode == 0, followed.stdout + followed.stderr
        steps = recorded(run)
    return {"accepted_s": accepted, "first_step_s": steps[0]["time"] - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of eight steps")
    parser.add_argument("--skip-submit", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        run_bare(*arguments.bare)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-launch-") as name:
        folder = Path(name)
        spec, run = write_spec(folder, "launched", arguments.epochs), folder / "runs" / "launched"
        launch(write_spec(folder, "warm-up", 2), folder / "runs" / "warm-up")  # compiles, and fills the page cache
        results["launch"] = launch(spec, run)
        results["bare"] = bare(spec, run / "shards" / "train", folder / "bare.json")
        if not arguments.skip_submit:
            results["submit"] = submit(folder, 2)
    launched, plain = results["launch"], results["bare"]
    results["overhead_s"] = launched["wall_s"] - plain["wall_s"]
    results["machine"] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    rows = [
        ("refinedet launch, prepare and train", launched["wall_s"], launched["first_step_s"], launched["steps_s"]),
        ("the same loop in bare processes", plain["wall_s"], plain["first_step_s"], plain["steps_s"]),
    ]
    lines = [f"{'':<38}{'whole':>9}{'first step':>12}{'steps':>9}"]
    lines += [f"{what:<38}{wall:>7.1f} s{first:>10.1f} s{steps:>7.1f} s" for what, wall, first, steps in rows]
    lines.append(f"overhead of launch {results['overhead_s']:.1f} s, at most {LAUNCH_LIMIT_S:g} wanted")
    if "submit" in results:
        lines.append(
            f"submit to first step {results['submit']['first_step_s']:.1f} s, at most {SUBMIT_LIMIT_S:g} wanted"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
