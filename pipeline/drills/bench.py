"""`refinedet drill NAME`: break a small real job on purpose, watch it recover, print expected beside seen.

Every drill launches jobs as a user does, in processes of their own, on one small Ray cluster that all drills share, and
compares what comes out with an undisturbed run of the same spec.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from refinedet.pipeline.drills import faults, witness
from refinedet.pipeline.runs import settings, storage
from refinedet.pipeline.runs.errors import JobError
from refinedet.pipeline.runs.lines import read_lines

_POLL_S = 0.2
_TIMEOUT_S = 600.0
_START_S = 120.0
"""for further attempts to start Ray, on a busy machine"""
SPEC: dict[str, Any] = {
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
        "micro_batch": 2,  # batch norm's statistics are then the same with one worker
        "epochs": 4,
        "learning_rate": 0.002,
        "reference_batch": 4,
        "warmup_epochs": 1,
        "warmup_learning_rate": 0.0005,
        "decay_epochs": [3],
        "deterministic": True,
        "precision": "fp32",
        "zero_stage": 1,
        "keep_last": 4,
    },
    "tracking": {"log_every_steps": 1},
    "cluster": {"workers": 2, "stop_grace_s": 60},
}
STEPS_AN_EPOCH = 8
STEPS = 32


@dataclass(frozen=True)
class Check:
    """One line of a drill's verdict."""

    what: str
    expected: str
    seen: str
    passed: bool


@dataclass
class Launched:
    """A job that was launched, and how it ended."""

    process: subprocess.Popen
    output: Path

    def wait(self) -> int:
        """Exit status; a job that takes too long is killed, and counts as failed."""
        try:
            return self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return -1

    def kill(self) -> None:
        """End the driver at once; its workers end with it, for Ray sees that it is gone."""
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


@dataclass
class Bench:
    """A directory in which drills run their jobs, and what they see there."""

    folder: Path
    checks: list[Check] = field(default_factory=list)
    jobs: list[Launched] = field(default_factory=list)
    _cluster: Any = None
    _stopped: int | None = None

    @property
    def cluster(self) -> Any:
        """The drills' own Ray, a `ray.cluster_utils.Cluster` on this machine; started when it is first asked for."""
        if self._cluster is None:
            settings.suggest("RAY_AUTH_MODE", "disabled")  # no one else is to reach it
            settings.provide("ray")
            self._cluster = storage.retry(_start_cluster, "Ray on this machine", deadline_s=_START_S)
        return self._cluster

    def end_jobs(self) -> None:
        """End what still runs."""
        for job in self.jobs:
            if job.process.poll() is None:
                job.kill()

    def close(self) -> None:
        self.end_jobs()
        if self._cluster is not None:
            self._cluster.shutdown()

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def write_spec(self, name: str, **changes: dict[str, Any]) -> Path:
        """A spec file of the drills' small job; `changes` by section."""
        spec: dict[str, Any] = {"name": name, "runs": str(self.folder / "runs")} | {
            section: {**SPEC[section], **changes.get(section, {})} for section in SPEC
        }
        spec["data"]["shards"] = str(self.folder / "shards")  # drawn once for all drills
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec), encoding="utf-8")
        return path

    def launch(self, spec: Path, *, fault: str = "", witnessed: bool = False) -> Launched:
        """Launch a spec's training, and before the first one its data, in a process of its own.

        witnessed  the workers note the samples that they learn from; `history` reads the notes
        """
        stages = "train" if (self.folder / "shards" / "train" / "index.json").exists() else "prepare,train"
        command = [sys.executable, "-m", "refinedet.pipeline.cli", "launch", str(spec), "--stages", stages]
        command += ["--address", self.cluster.address]
        hook = witness.hook(fault) if witnessed else faults.hook(fault) if fault else None
        environment = settings.inherited(**({settings.FAULT_VARIABLE: hook} if hook else {}))
        output = self.folder / f"{spec.stem}.{time.time_ns()}.out"
        with open(output, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.jobs.append(Launched(process, output))
        return self.jobs[-1]

    def finish(self, spec: Path) -> Launched:
        """Launch and wait."""
        job = self.launch(spec)
        job.wait()
        return job

    def steps(self, name: str) -> list[int]:
        """Steps that a run has logged, in the order in which it took them."""
        return [line["step"] for line in read_lines(str(self.run(name) / "metrics.jsonl"))]

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(str(self.run(name) / "events.jsonl")) if line["kind"] == kind]

    def steps_again(self, name: str) -> list[int]:
        """Steps done again after each return to a checkpoint, in order."""
        steps = self.steps(name)
        return [before + 1 - now for before, now in itertools.pairwise(steps) if now <= before]

    def history(self, name: str, reference: str) -> dict[int, witness.Fingerprints]:
        """The samples of every step of a witnessed run; of a step done again, those of the last time.

        reference  an undisturbed witnessed run of the same spec, whose passes are its steps
        """
        (passes,) = witness.read_attempts(str(self.run(reference)))
        places: dict[str, set[int]] = {}  # images without objects look the same in several steps
        for step, samples in enumerate(passes, 1):
            for sample in samples:
                places.setdefault(sample, set()).add(step)
        history = {}
        for samples in itertools.chain(*witness.read_attempts(str(self.run(name)))):
            steps = set.intersection(*(places.get(sample, set()) for sample in samples))
            history[steps.pop() if len(steps) == 1 else -1] = samples
        return history

    def world_sizes(self, name: str) -> list[int]:
        """Numbers of workers of every start, from what the preflight saw."""
        return [len(event["facts"]["hosts"]) for event in self.events(name, "preflight")]

    def workers(self, name: str) -> list[psutil.Process]:
        """The training workers' processes that run, by rank."""
        pids = {event["facts"]["rank"]: event["facts"]["pid"] for event in self.events(name, "started")}
        return [psutil.Process(pids[rank]) for rank in sorted(pids) if psutil.pid_exists(pids[rank])]

    def commits(self, name: str) -> list[int]:
        """Steps of the committed checkpoints, oldest first."""
        return sorted(
            int(path.parent.name.split("-")[1]) for path in self.run(name).glob("checkpoints/*/manifest.json")
        )

    def wait_for(self, job: Launched, condition: Callable[[], Any]) -> bool:
        """Wait until the condition holds; False where the job ended, or time ran out, before."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            if condition():
                return True
            if job.process.poll() is not None:
                return bool(condition())
            time.sleep(_POLL_S)
        return False

    def weights(self, name: str) -> bytes:
        path = self.run(name) / "weights.safetensors"
        return path.read_bytes() if path.exists() else b""

    def undisturbed(self) -> str:
        """The name of a run of the drills' job that nothing happened to; made once."""
        if not self.weights("undisturbed"):
            self.finish(self.write_spec("undisturbed"))
        return "undisturbed"

    def stopped(self, name: str) -> int | None:
        """Make a run that SIGTERM stopped after its first checkpoint; returns the exit status of the job that it ended.

        It is done once, and copied for every drill that begins so.
        """
        if self._stopped is None:
            job = self.launch(self.write_spec("stopped"))
            if not self.wait_for(
                job, lambda: self.commits("stopped") and self.steps("stopped")[-1] > STEPS_AN_EPOCH + 2
            ):
                raise JobError(
                    f"the job to stop made no checkpoint within {_TIMEOUT_S:g} s; {job.output} has the reason"
                )
            os.kill(job.process.pid, signal.SIGTERM)  # what a scheduler sends before it takes a node away
            self._stopped = job.wait()
        shutil.copytree(self.run("stopped"), self.run(name))
        (self.run(name) / "tracking.json").unlink(missing_ok=True)  # a copy is another run to MLflow
        path = self.run(name) / "spec.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "name": name}), encoding="utf-8")
        return self._stopped

    def check(self, what: str, expected: Any, seen: Any, passed: bool | None = None) -> None:
        self.checks.append(Check(what, str(expected), str(seen), expected == seen if passed is None else passed))

    def check_same_weights(self, name: str) -> None:
        """The end is bitwise what it would have been."""
        from safetensors.torch import load

        ours, theirs = self.weights(name), self.weights(self.undisturbed())
        if not ours or not theirs:
            self.check("final weights", "as of an undisturbed run", "there are none", False)
            return
        mine, other = load(ours), load(theirs)
        different = [key for key in other if key not in mine or not mine[key].equal(other[key])]
        self.check(
            "final weights",
            "bitwise those of an undisturbed run",
            f"{len(other) - len(different)} of {len(other)} tensors equal",
            not different,
        )

    def check_losing_at_most_one_interval(self, name: str, broken_at: int) -> None:
        resumed = [event["step"] for event in self.events(name, "resumed")]
        lost = broken_at - resumed[-1] if resumed else broken_at
        self.check(
            "steps lost", f"at most {STEPS_AN_EPOCH}, one interval", lost, bool(resumed) and lost <= STEPS_AN_EPOCH
        )


def _start_cluster() -> Any:
    from ray.cluster_utils import Cluster

    settings.suggest("RAY_health_check_initial_delay_ms", "0")
    settings.suggest("RAY_health_check_period_ms", "1000")
    return Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})


def run_drills(
    drills: Mapping[str, Callable[[Bench], None]], report: Callable[[str, float, list[Check]], None]
) -> bool:
    """Run drills; `report` is called with (name, seconds, checks) after each. True where all passed."""
    folder = Path(tempfile.mkdtemp(prefix="refinedet-drill-"))
    bench, passed = Bench(folder), True
    try:
        for name, drill in drills.items():
            bench.checks.clear()
            began = time.monotonic()
            try:
                drill(bench)
            finally:
                bench.end_jobs()
            passed &= bool(bench.checks) and all(check.passed for check in bench.checks)
            report(name, time.monotonic() - began, list(bench.checks))
    finally:
        bench.close()
        if passed:
            shutil.rmtree(folder, ignore_errors=True)
    return passed
