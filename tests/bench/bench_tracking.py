"""Cost of records in a training step, and of an outage of MLflow's server.

    python -m tests.bench.bench_tracking [--there 20] [--away 30] [--every 10] [--spare 0] [--quick] [--json OUT]

The training loop runs in a worker process of a local Ray and sends its records through the job's mailbox, as a job's
rank 0 does. This process is the driver: recorder, metrics.jsonl and MLflow's outbox, beside a real server. The server
runs, is killed, and runs again. Steps while it is away are compared with those before and after. Starting the
server takes the processor, so steps meanwhile count nowhere. At the end every point must be in the server once.
--json adds a row to those that OUT has.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from refinedet.model import RefineDet, sum_losses
from refinedet.pipeline.cluster.mailbox import Mailbox, MailboxLink
from refinedet.pipeline.cluster.recorder import TrainingRecorder
from refinedet.pipeline.cluster.result_pictures import ResultPictures
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Cluster, JobSpec
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.tracking.runs import RunTracker
from refinedet.pipeline.training.loop import train
from refinedet.pipeline.training.records import StepRecord
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.world import open_world
from rich.console import Console

from tests.bench.bench_loop import OneBatch
from tests.bench.record import describe_where, save_result
from tests.mlflow_server import MlflowServer

POLL_S = 0.3
"""between two looks into the mailbox, as the train stage does"""
WARMUP_S = 6.0
QUICKSTART = {"num_classes": 10, "input_size": 128, "backbone": "regnetx_002", "tcb_channels": 128}
COLUMNS = [
    "steps with the server", "steps without", "step with the server, s", "step without, s", "without beside with",
    "handing a record over, ms", "of a step", "driver's processor time per step, ms", "of the cores", "points missing",
    "points twice",
]  # fmt: skip


def train_with_records(actor: Any, spec: dict[str, Any], threads: int) -> list[float]:
    """Train on one batch until the driver stops it; returns the seconds that each record held up the loop."""
    torch.set_num_threads(threads)
    run, link = Run(JobSpec.model_validate(spec)), MailboxLink(actor, 0)
    training, config, held_up = run.spec.training, run.spec.model, []

    def tell(record: StepRecord) -> None:
        began = time.perf_counter()
        link.push(record)
        held_up.append(time.perf_counter() - began)

    plan = BatchPlan(training.global_batch, training.global_batch, 1, 1)
    stream = OneBatch(Cursor(), plan, config.input_size)
    torch.manual_seed(0)
    task = Task(
        RefineDet(config),
        functools.partial(sum_losses, config=config),
        make_stream=lambda start, plan: stream,  # type: ignore[arg-type, return-value]
        run_dir=run.path,
    )
    with open_world("cpu") as world:
        train(training, world, task, Callbacks(on_step=tell, stop_requested=lambda: link.stop_requested))
    return held_up


@dataclass
class Block:
    """Steps of a time in which the server answers, or does not."""

    seconds: list[float] = field(default_factory=list)
    processor_s: float = 0.0
    """of the driver and the mailbox"""


class Driver:
    """Takes records from the mailbox to recorder and server."""

    def __init__(self, mailbox: Mailbox, recorder: TrainingRecorder) -> None:
        self._mailbox, self._recorder = mailbox, recorder
        self._processes = [psutil.Process()]

    def watch_mailbox(self) -> None:
        """Count the mailbox's processor time too."""
        workers = psutil.Process().children(recursive=True)
        self._processes += [one for one in workers if "_Mailbox" in " ".join(one.cmdline())]

    def take(self, seconds: float) -> Block:
        block, ends, before = Block(), time.monotonic() + seconds, self._processor_s()
        while time.monotonic() < ends:
            block.seconds += self._take()
            time.sleep(POLL_S)
        block.processor_s = self._processor_s() - before
        return block

    def take_until(self, done: Any) -> None:
        """Stop the loop, and take what it still sends."""
        import ray

        while not ray.wait([done], timeout=POLL_S)[0]:
            self._take(stop=True)
        self._take(stop=True)

    def _take(self, stop: bool = False) -> list[float]:
        records = [message for _, message in self._mailbox.take(stop=stop)]
        for record in records:
            self._recorder(record)
        return [record.times.total for record in records]

    def _processor_s(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)


@contextmanager
def tracked(run: Run, folder: Path) -> Iterator[tuple[RunTracker, TrainingRecorder]]:
    tracker = RunTracker(run.spec.tracking, name=run.spec.name, run_dir=run.path, runs=run.runs)
    begun: Future[RunTracker] = Future()
    begun.set_result(tracker)
    pictures = ResultPictures(run)
    recorder = TrainingRecorder(run, ProgressDisplay(Console(quiet=True)), begun, pictures)
    with tracker:
        try:
            yield tracker, recorder
        finally:
            recorder.close()
            pictures.close()


def measure(folder: Path, there_s: float, away_s: float, every: int, threads: int) -> dict[str, Any]:
    import ray  # after `refinedet.pipeline.cluster`, which draws the token of the local node

    server = MlflowServer(folder)
    spec = JobSpec.model_validate(
        {
            "name": "tracking",
            "runs": str(folder / "runs"),
            "data": {"format": "shapes", "train": [{"count": 1_600_000}]},
            "model": {**QUICKSTART, "prediction_block": False},
            "training": {"global_batch": 16, "reference_batch": 16, "precision": "fp32", "epochs": 1},
            "tracking": {"uri": server.uri, "log_every_steps": every},
        }
    )
    run = Run(spec)
    Path(run.path).mkdir(parents=True)
    try:
        with Mailbox() as mailbox, tracked(run, folder) as (tracker, recorder):
            driver = Driver(mailbox, recorder)
            loop = ray.remote(train_with_records)
            done = loop.remote(mailbox.actor, spec.model_dump(mode="json"), threads)
            while not driver.take(0.5).seconds:
                assert not ray.wait([done], timeout=0)[0], ray.get(done)
            driver.watch_mailbox()
            driver.take(WARMUP_S)
            before = driver.take(there_s)
            server.kill()
            away = driver.take(away_s)
            server.start(meanwhile=lambda: driver.take(0.5))
            driver.take(WARMUP_S)
            after = driver.take(there_s)
            driver.take_until(done)
            held_up = ray.get(done)
        return figures(before, away, after, held_up) | points(server, tracker.run_id, Path(run.file("metrics.jsonl")))
    finally:
        server.kill()


def figures(before: Block, away: Block, after: Block, held_up: list[float]) -> dict[str, Any]:
    there = before.seconds + after.seconds
    processor_s = (before.processor_s + after.processor_s) / len(there)
    step_s, record_s = statistics.median(there), statistics.fmean(held_up)
    return {
        "steps_there": len(there),
        "steps_away": len(away.seconds),
        "step_there_s": step_s,
        "step_away_s": statistics.median(away.seconds),
        "step_before_s": statistics.median(before.seconds),
        "step_after_s": statistics.median(after.seconds),
        "mean_step_there_s": statistics.fmean(there),
        "mean_step_away_s": statistics.fmean(away.seconds),
        "record_ms": record_s * 1000,
        "record_median_ms": statistics.median(held_up) * 1000,
        "record_share": record_s / step_s,
        "driver_ms_a_step": processor_s * 1000,
        "driver_share": processor_s / (step_s * (os.cpu_count() or 1)),
    }


def points(server: MlflowServer, run_id: str, log: Path) -> dict[str, int]:
    """Points of the loss that the server lacks, and that it has more than once."""
    wanted = {line["step"] for line in map(json.loads, log.read_text().splitlines()) if "losses" in line}
    rows = server.rows(f"SELECT step FROM metrics WHERE run_uuid = '{run_id}' AND key = 'loss/total'")
    return {"missing": len(wanted - {step for (step,) in rows}), "twice": len(rows) - len(set(rows))}


def row(found: dict[str, Any]) -> list[Any]:
    return [
        found["steps_there"],
        found["steps_away"],
        round(found["step_there_s"], 4),
        round(found["step_away_s"], 4),
        round(found["step_away_s"] / found["step_there_s"], 3),
        round(found["record_ms"], 2),
        f"{100 * found['record_share']:.2f} %",
        round(found["driver_ms_a_step"], 1),
        f"{100 * found['driver_share']:.1f} %",
        found["missing"],
        found["twice"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--there", type=float, default=20.0, help="seconds before, and after, the outage")
    parser.add_argument("--away", type=float, default=30.0, help="seconds of the outage")
    parser.add_argument("--every", type=int, default=10, help="tracking.log_every_steps")
    parser.add_argument("--spare", type=int, default=0, help="cores that the loop leaves to server and driver")
    parser.add_argument("--quick", action="store_true", help="4 s there and away: only that it runs to its end")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    if options.quick:
        options.there = options.away = 4.0
    threads = max(1, (os.cpu_count() or 1) - options.spare)
    with ray_session(Cluster()), tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.there, options.away, options.every, threads)
    print(json.dumps(found, indent=1))  # noqa: T201
    if options.json:
        out = Path(options.json)
        earlier = json.loads(out.read_text())["figures"] if out.exists() else []
        save_result(
            out,
            COLUMNS,
            [row(one) for one in [*earlier, found]],
            describe_where(("ray", "mlflow")),
            workload=(
                f"Quickstart's detector, batch 16, one worker of {threads} threads, on the cores that server and "
                f"driver use too; a point of every curve each {options.every} steps. A row a run: MLflow's server is "
                f"there for {options.there:g} s, killed for {options.away:g} s, there again as long. Medians of steps; "
                "means of records."
            ),
            spread="the rows",
            figures=[*earlier, found],
        )


if __name__ == "__main__":
    main()
