"""Real worker processes for tests: each is one rank that trains the tiny detector, and may be killed.

A fork server imports torch and DeepSpeed once; workers are forked from it in milliseconds.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from refinedet.model import RefineDet, sum_losses
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.stop import stop_signals
from refinedet.pipeline.training.loop import train
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.world import World, open_world

from tests.training.fakes import SMALL_REFINEDET, SquareStream, TinyDetector, TinyStream, tiny_loss

TINY = Training(
    global_batch=8,
    reference_batch=8,
    micro_batch=2,
    epochs=3,
    learning_rate=0.05,
    warmup_learning_rate=0.01,
    decay_epochs=(2,),
    precision="fp32",
    deterministic=True,
    checkpoint_every_steps=2,
    ema_decay=0.9,
)
STEPS = 15
_PRELOAD = "tests.training.workers"


@dataclass(frozen=True)
class Fault:
    """A fault of one rank, before the step number `step` (from 1) or right after it."""

    rank: int
    step: int
    kind: str
    """kill, freeze, sleep, slow, poison, raise, stop"""


@dataclass(frozen=True)
class Outcome:
    """The output of a rank."""

    exit_code: int | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    error: str = ""


def run_workers(
    folder: Path, size: int, spec: Training = TINY, fault: Fault | None = None, *, refinedet: bool = False
) -> list[Outcome]:
    """Run `size` ranks to their end in `folder`, and return what each did. Frozen ones are killed at the end.

    refinedet   train a real detector, of the smallest size
    """
    context = _fork_server()
    told = Path(tempfile.mkdtemp(dir=folder.parent))
    arguments = (str(folder), str(told), size, spec, fault, refinedet)
    processes = [context.Process(target=_work, args=(rank, *arguments), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 300
    for rank, process in enumerate(processes):
        frozen = fault is not None and fault.kind == "freeze" and fault.rank == rank
        if not frozen:
            process.join(max(1.0, deadline - time.monotonic()))
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [_outcome(told, rank, process.exitcode) for rank, process in enumerate(processes)]


def _fork_server() -> ForkServerContext:
    """A server that has imported everything; one that an earlier test started without makes way for it."""
    context = multiprocessing.get_context("forkserver")
    if _PRELOAD not in forkserver._forkserver._preload_modules:  # type: ignore[attr-defined]
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        context.set_forkserver_preload([_PRELOAD])
    return context


def run_together(work: Callable[..., Any], folder: Path, *arguments: Any, size: int = 2) -> list[Any]:
    """Call `work(world, *arguments)` in `size` ranks at once; what they return, JSON values, by rank."""
    context = _fork_server()
    told = Path(tempfile.mkdtemp(dir=folder))
    calls = [(rank, size, str(told), work, arguments) for rank in range(size)]
    processes = [context.Process(target=_call, args=call, daemon=True) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [json.loads((told / f"{rank}.json").read_text()) for rank in range(size)]


def _call(rank: int, size: int, told: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _join_group(rank, size, told)
    with open_world("cpu") as world:
        (Path(told) / f"{rank}.json").write_text(json.dumps(work(world, *arguments)))
        world.barrier()
    os._exit(0)


def _join_group(rank: int, size: int, told: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{told}/group", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def _outcome(told: Path, rank: int, exit_code: int | None) -> Outcome:
    lines = [json.loads(line) for line in (told / f"rank-{rank}.jsonl").read_text().splitlines()]
    kinds: dict[str, list[Any]] = {"step": [], "event": [], "result": [], "error": []}
    for kind, value in lines:
        kinds[kind].append(value)
    return Outcome(exit_code, kinds["step"], kinds["event"], (kinds["result"] or [None])[0], "".join(kinds["error"]))


def _work(rank: int, folder: str, told: str, size: int, spec: Training, fault: Fault | None, refinedet: bool) -> None:
    logging.disable(logging.CRITICAL)
    _join_group(rank, size, told)
    hurt = fault if fault and fault.rank == rank else None
    with (Path(told) / f"rank-{rank}.jsonl").open("a", buffering=1) as file:

        def tell(kind: str, value: Any) -> None:
            file.write(json.dumps([kind, value]) + "\n")

        def observe(record: StepRecord) -> None:
            tell("step", {"step": record.step, "losses": record.losses, "norm": record.gradient_norm})

        try:
            with open_world("cpu") as world, stop_signals(lambda _: None) as stop:
                result = _train(
                    spec, world, folder, hurt, refinedet, observe, lambda event: tell("event", vars(event)), stop
                )
            tell("result", vars(result))
        except Exception as error:
            tell("error", f"{type(error).__name__}: {error}")
            raise SystemExit(1) from None
    os._exit(0)  # a group whose other ranks were killed may not end


def _train(
    spec: Training,
    world: World,
    folder: str,
    hurt: Fault | None,
    refinedet: bool,
    observe: Any,
    on_event: Any,
    stop: threading.Event,
) -> TrainResult:
    torch.manual_seed(0)
    task = Task(
        detector=RefineDet(SMALL_REFINEDET) if refinedet else TinyDetector(),
        loss=functools.partial(sum_losses, config=SMALL_REFINEDET) if refinedet else tiny_loss,
        make_stream=lambda start, plan: (
            SquareStream(start, plan, world.rank) if refinedet else HurtStream(start, plan, world.rank, hurt)
        ),  # type: ignore[arg-type, return-value]
        run_dir=folder,
        seed=3,
    )
    return train(spec, world, task, Callbacks(on_step=observe, on_event=on_event, stop_requested=stop.is_set))


class HurtStream(TinyStream):
    """A stream in which the fault happens."""

    def __init__(self, start: Any, plan: Any, rank: int, fault: Fault | None) -> None:
        poison = (fault.step - 1, rank) if fault and fault.kind == "poison" else None
        super().__init__(start, plan, rank, poison=poison)
        self.fault = fault

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            step = batch.epoch * self.batches_per_epoch + batch.index + 1
            if self.fault and self.fault.kind == "slow":
                time.sleep(0.2)
            elif self.fault and batch.part == 0 and step == self.fault.step + 1:
                if self.fault.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.fault.kind == "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
            elif self.fault and batch.part == 0 and step == self.fault.step:
                if self.fault.kind == "freeze":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif self.fault.kind == "sleep":
                    time.sleep(60)
                elif self.fault.kind == "raise":
                    raise RuntimeError("the disk is gone")
            yield batch


__all__ = ["STEPS", "TINY", "Event", "Fault", "Outcome", "read_weights", "run_together", "run_workers"]
