"""Costs that grow with the number of ranks: a step for driver and rank, a stall's verdict, saving, resuming.

    python -m tests.bench.bench_ranks [--quick] [--json OUT]

The functions are the product's; the other ranks are simulated: collectives return what that many ranks would give, and
take no time, since the network is not what is measured. Limits at 1,024 ranks: 1 ms of the driver and 0.1 ms of a rank
a step; the bytes of a checkpoint and of the shards' index are read once.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec, Tracking
from refinedet.pipeline.data.index import FORMAT_VERSION, INDEX
from refinedet.pipeline.runs import settings, storage
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.tracking.runs import RunTracker
from refinedet.pipeline.training.checkpoint import FORMAT, load_checkpoint
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.exchange import agree
from refinedet.pipeline.training.owners import assign_owners
from refinedet.pipeline.training.records import StepRecord, StepTimes
from refinedet.pipeline.training.saving import SaveState
from refinedet.pipeline.training.stragglers import StragglerWatch
from refinedet.pipeline.training.training_job import open_training_shards
from refinedet.pipeline.training.watchdog import StallReport, judge_stall
from refinedet.pipeline.training.world import World

from tests.bench.record import describe_where, save_result

RANKS = (64, 1024, 10000)
DRIVER_LIMIT_MS, RANK_LIMIT_MS = 1.0, 0.1
RANKS_PER_NODE = 8
STEP_S, SAMPLE_S = 0.15, 10.0  # a step of the plan's largest job; a node's load comes this often
TENSORS, FILES, SHARDS = 900, 256, 120
PARTS = 12  # losses and shares of anchors in a step's one collective


@dataclass(frozen=True)
class SimulatedWorld(World):
    """One rank of many. Rank 0 goes first: what it broadcasts, the others receive; other sources give nothing."""

    told: list[Any] = field(default_factory=list)
    received: list[int] = field(default_factory=lambda: [0])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach() * self.size

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        return values.expand(self.size, -1)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]  # the others' messages have no fault

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        if source != 0:
            return value
        if self.is_main:
            self.told.append(value)
            return value
        self.received[0] += 1
        return self.told[self.received[0] - 1]

    def broadcast_(self, tensors: list[torch.Tensor], source: int) -> None:
        pass


def per_call_ms(action: Callable[[int], object], calls: int, rounds: int = 5) -> float:
    """Milliseconds of a call, the median of some rounds of `calls`."""
    took = []
    for at in range(rounds):
        began = time.perf_counter()
        for number in range(calls):
            action(at * calls + number)
        took.append((time.perf_counter() - began) * 1e3 / calls)
    return statistics.median(took)


def step_record(step: int) -> StepRecord:
    return StepRecord(
        step=step, total_steps=10**9, epoch=0, batch=step, learning_rate=0.1,
        losses={f"loss_{part}": 1.0 for part in range(4)} | {"total": 4.0},
        shares={f"survivors_{level}": 0.5 for level in range(1, 6)} | {"rows": 0.5},
        gradient_norm=1.0, loss_scale=1.0, applied=True, skipped_steps=0, images=32, images_per_s=200.0,
        memory_bytes=2**33, times=StepTimes(total=STEP_S), model_tflops=500.0, mfu=0.2,
    )  # fmt: skip


def driver_ms(ranks: int, calls: int) -> dict[str, float]:
    """The driver's work of a step: one message of rank 0, and its share of the loads of all nodes.

    As in a job, every tenth step is logged. MLflow's writing runs in a thread of the tracker; what it takes of the
    interpreter is measured with it.
    """
    from refinedet.pipeline.cluster.recorder import TrainingRecorder
    from refinedet.pipeline.cluster.worker_task import NodeSample

    with tempfile.TemporaryDirectory() as folder:
        data = {"format": "shapes", "train": [{"count": 4}]}
        run = Run(JobSpec.model_validate({"name": "r", "runs": folder, "data": data}))
        os.makedirs(run.path)
        begun: Future[RunTracker] = Future()
        with RunTracker(Tracking(), name="r", run_dir=run.path, runs=folder) as tracker, ProgressDisplay() as display:
            begun.set_result(tracker)
            recorder = TrainingRecorder(run, display, begun, pictures=cast(Any, None))
            message = pickle.dumps(step_record(1))

            def step(number: int) -> None:
                pickle.loads(message)
                recorder(step_record(number + 1))

            values = {f"system/gpu_{at}": 0.5 for at in range(20)}
            sample_ms = per_call_ms(lambda number: recorder(NodeSample("other", number, values)), calls // 4, rounds=3)
            step_ms = per_call_ms(step, calls, rounds=3)
            recorder.close()
    samples = ranks / RANKS_PER_NODE * STEP_S / SAMPLE_S
    return {"record_ms": step_ms, "loads_ms": samples * sample_ms, "driver_ms": step_ms + samples * sample_ms}


def rank_ms(ranks: int, calls: int) -> dict[str, float]:
    """A rank's work of a step that could grow: the agreement, the clock, every 20th step the search for stragglers."""
    world = SimulatedWorld(rank=1, size=ranks)
    values, clock, watch = torch.zeros(PARTS), StepClock(world.device), StragglerWatch(world)

    def settle(_: int) -> None:
        for phase in ("data", "forward", "backward", "optimizer", "checkpoint"):
            with clock.measure(phase):
                pass
        watch.add(clock.finish_step())

    def agreed(_: int) -> None:
        agree(
            world, values, stop=False, failed=False, saving=SaveState.IDLE, given_up=False, committed_step=7, order=99
        )

    apart = {"agree_ms": per_call_ms(agreed, calls), "clock_and_stragglers_ms": per_call_ms(settle, calls)}
    return {**apart, "rank_ms": sum(apart.values())}


def stall_ms(ranks: int) -> float:
    """Rank 0's judgement of a stall, once all reports are read."""
    reports = [
        StallReport(rank, f"node-{rank // 8}", rank, 12, "reduce", 600.0, rank != 7, "stack " * 100)
        for rank in range(ranks)
        if rank != 9
    ]
    hosts = [f"node-{rank // 8}" for rank in range(ranks)]
    return per_call_ms(lambda _: json.dumps(asdict(judge_stall(reports, hosts))), 1)


def deal_ms(ranks: int) -> float:
    """A rank's dealing of a checkpoint's tensors, once a save."""
    sizes = {f"backbone.layer.{at}.weight": 1000 + 37 * (at % 50) for at in range(TENSORS)}
    return per_call_ms(lambda _: assign_owners(sizes, ranks), 1)


@contextmanager
def counted(counts: Counter[str]) -> Iterator[None]:
    """Count requests to storage and the bytes of files."""
    names = ("read_bytes", "exists", "list_folder")
    plain = {name: getattr(storage, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(path: str, *rest: Any) -> Any:
            found = plain[name](path, *rest)
            counts[name] += 1
            if name == "read_bytes":
                counts["bytes"] += len(found)
            return found

        return call

    for name in names:
        setattr(storage, name, counting(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(storage, name, function)


def write_checkpoint(run_dir: Path) -> int:
    """A checkpoint of FILES files; its bytes."""
    folder = run_dir / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    entries, total = [], 0
    for number in range(FILES):
        content = safetensors.torch.save({f"model.{number}": torch.full((256,), float(number))})
        (folder / f"part-{number}.safetensors").write_bytes(content)
        digest = storage.digest_bytes(content)
        entries.append({"name": f"part-{number}.safetensors", "size": len(content), "sha256": digest})
        total += len(content)
    manifest = json.dumps({"format": FORMAT, "step": 12, "files": entries}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    return total + len(manifest)


def write_shards(run: Run) -> int:
    """An index of SHARDS shards of the training split; its bytes."""
    names = [f"shard-{number:06d}.tar" for number in range(SHARDS)]
    table = {"names": names, "sha256": ["0" * 64] * SHARDS, "contents_sha256": ["0" * 64] * SHARDS}
    table |= {"bytes": [2**27] * SHARDS, "num_samples": [1000] * SHARDS}
    index = {"format_version": FORMAT_VERSION, "format": "coco", "part": "train", "digest": "0" * 64}
    index |= {"categories": [{"id": number, "name": f"class {number}"} for number in range(80)], "shards": table}
    path = Path(run.shards, "train", INDEX)
    path.parent.mkdir(parents=True)
    path.write_bytes(content := json.dumps(index).encode())
    return len(content)


def resume_reads(ranks: int) -> dict[str, float]:
    """Requests and bytes of all ranks together when the index of the shards and a checkpoint are loaded."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        data = {"format": "shapes", "train": [{"count": 4}]}
        run = Run(JobSpec.model_validate({"name": "r", "runs": folder, "data": data}))
        total, told = write_checkpoint(Path(run.path)) + write_shards(run), []
        with counted(counts):
            for rank in range(ranks):
                world = SimulatedWorld(rank=rank, size=ranks, told=told)
                assert open_training_shards(run, world) is not None
                assert load_checkpoint(run.path, world, lambda event: None) is not None
    requests = sum(counts[name] for name in ("read_bytes", "exists", "list_folder"))
    return {"resume_requests": requests, "resume_bytes": counts["bytes"], "resume_times": counts["bytes"] / total}


def measure(ranks: int, quick: bool) -> dict[str, float]:
    return {
        "ranks": ranks,
        **driver_ms(ranks, 100 if quick else 1000),
        **rank_ms(ranks, 100 if quick else 1000),
        "stall_ms": stall_ms(ranks),
        "deal_ms": deal_ms(ranks),
        **resume_reads(ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 and 1,024 ranks, fewer repetitions")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings.provide("ray")
    settings.provide_ray_token()
    import ray  # which reads the token when it is loaded

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)  # the recorder's gauges are Ray's
    try:
        rows = [measure(ranks, options.quick) for ranks in RANKS[: 2 if options.quick else 3]]
    finally:
        ray.shutdown()
    print("| " + " | ".join(["", *(f"{row['ranks']:,.0f} ranks" for row in rows)]) + " |")  # noqa: T201
    for name in [name for name in rows[0] if name != "ranks"]:
        print("| " + " | ".join([name, *(f"{row[name]:,.4g}" for row in rows)]) + " |")  # noqa: T201
    if options.json:
        columns = ["", *(f"{row['ranks']:,.0f} ranks" for row in rows)]
        cells = [[name, *(f"{row[name]:.3g}" for row in rows)] for name in rows[0] if name != "ranks"]
        workload = "The product's functions with simulated ranks; collectives take no time. Milliseconds."
        save_result(options.json, columns, cells, describe_where(["ray"]), workload=workload, spread=None)
    judged = rows[1]
    met = judged["driver_ms"] <= DRIVER_LIMIT_MS and judged["rank_ms"] <= RANK_LIMIT_MS and judged["resume_times"] == 1
    print(f"at 1,024 ranks the limits are {'met' if met else 'NOT met'}")  # noqa: T201


if __name__ == "__main__":
    main()
