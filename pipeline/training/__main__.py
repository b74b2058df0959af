"""Train without Ray: `torchrun ... -m refinedet.pipeline.training JOB.yaml [key=value ...]`, or plain `python -m`.

The run's directory, shards and checkpoints are those of `refinedet launch`: either continues what the other began.
SIGTERM or SIGINT on any rank saves a checkpoint and ends all ranks with status 0; run the same command to resume.
This file composes rooms that do not import each other: training, and the evaluation that validates.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.config.start import check_start
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.evaluation.validation import prepare_validation
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.lines import LinesLog
from refinedet.pipeline.runs.stop import stop_signals
from refinedet.pipeline.training.finite import NonFiniteError
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.saving import SaveError
from refinedet.pipeline.training.training_job import Attempt, train_job
from refinedet.pipeline.training.world import World, open_world

logger = logging.getLogger("refinedet")


class FileLink:
    """Rank 0's records as lines of metrics.jsonl and events.jsonl; a stop from an event.

    A context manager: it opens the files, which are complete once it ends. Behind a URI only rank 0 writes.
    """

    def __init__(self, run: Run, stop: threading.Event, is_main: bool) -> None:
        self._run, self._stop = run, stop
        self._every = run.spec.tracking.log_every_steps
        self._writes = is_main or storage.is_local(run.path)
        self._files: dict[str, LinesLog] = {}

    def __enter__(self) -> FileLink:
        if self._writes:
            self._files = {name: LinesLog(self._run.file(name)) for name in ("metrics.jsonl", "events.jsonl")}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def push(self, message: StepRecord | Event, *, wait: bool = False) -> None:
        if isinstance(message, Event):
            logger.info("%s at step %d: %s", message.kind, message.step, message.message)
            self._append("events.jsonl", {"time": time.time(), **asdict(message)}, wait)
        elif message.step % self._every == 0 or message.step == message.total_steps:
            logger.info(
                "step %d of %d, loss %.4f, %.1f images/s",
                message.step, message.total_steps, message.losses["total"], message.images_per_s,
            )  # fmt: skip
            self._append("metrics.jsonl", message.line(), wait)

    def _append(self, name: str, line: dict, wait: bool) -> None:
        if self._writes:
            self._files[name].append(line, upload=wait)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished or saved after a signal, 1 failed, 2 a mistake of the user, in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m refinedet.pipeline.training", description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml", help="job spec; see jobs/")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="training.epochs=3 and the like")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    began_at = time.time()
    with stop_signals(logger.warning) as stop, open_world() as world:
        try:
            spec = load_spec(options.job, options.overrides)
            check_spec(spec)
            check_start(spec)
            result = _train(spec, world, stop, began_at)
        except (UserError, NonFiniteError, SaveError) as error:  # the same on all ranks
            if world.is_main:
                sys.stderr.write(f"{error}\n")
            return 2 if isinstance(error, UserError) else 1
        if world.is_main:
            logger.info("%s", _describe(result))
    return 0


def _train(spec: JobSpec, world: World, stop: threading.Event, began_at: float) -> TrainResult:
    run = Run(spec)
    with ExitStack() as stack:

        def open_run() -> None:
            stack.enter_context(run.open(on_lost=lambda _: stop.set()))  # another process has taken the run over
            _prepare(run)

        world.from_main(open_run)
        link = stack.enter_context(FileLink(run, stop, world.is_main))
        return train_job(run, world, link, attempt=Attempt(0, began_at), validate=prepare_validation(run, world))


def _prepare(run: Run) -> None:
    """Write the shards that training and validation read, or find them written."""
    training = run.spec.training
    parts = {"train", training.validate_on} if training.validate_every_epochs else {"train"}
    for part in sorted(parts):
        shards = prepare_shards(run.spec.data, part, storage.join(run.shards, part))
        write_coco_annotations(shards, run.ground_truth(part))


def _describe(result: TrainResult) -> str:
    if result.status == "stopped":
        return f"saved at step {result.step}; run the same command again to resume"
    return f"finished at step {result.step}; the weights are in {result.weights}"


if __name__ == "__main__":
    sys.exit(main())
