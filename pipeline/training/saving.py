"""Writing checkpoints beside training, and what happens when they cannot be written.

`CheckpointWriter.start` takes the tensors, a thread writes this rank's file, the ranks exchange in every step how far
they are, and once all files are written rank 0 commits: it writes the manifest, without which a checkpoint is none. A
save that fails is reported. After `max_failed_saves` in a row training waits and saves again; the weights of a run that
cannot be saved go to the first place that takes them.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from typing import Any, TypeVar

import safetensors.torch
from refinedet.model import RefineDet
from refinedet.model.hub import detector_metadata
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.storage import FileDigest
from refinedet.pipeline.training.checkpoint import FORMAT, MANIFEST, Checkpoint, checkpoints_folder, prune
from refinedet.pipeline.training.ema import AveragedWeights
from refinedet.pipeline.training.records import Event
from refinedet.pipeline.training.world import World
from torch import Tensor

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
T = TypeVar("T")
_OUTAGE_S = 15.0
"""a shorter outage of the storage delays a save, a longer one fails it"""
_FIRST_WAIT_S = 10.0
_LONGEST_WAIT_S = 300.0


class SaveError(OSError):
    """The state cannot be saved, which a restart does not change; the message has the reason and the weights' place."""


class SaveState(IntEnum):
    """Progress of this rank with the checkpoint being written; exchanged in every step."""

    IDLE = 0
    WRITING = 1
    WRITTEN = 2
    FAILED = 3


class CheckpointWriter:
    """Writes the checkpoints of one rank. `start` and `settle` are collective; `advance` follows the exchange."""

    def __init__(self, run_dir: str, world: World, spec: Training) -> None:
        self.run_dir = run_dir
        self.world = world
        self.spec = spec
        self.committed: str | None = None
        """the newest committed checkpoint; rank 0 has it first"""
        self.committed_step = -1
        self.failure: str | None = None
        """why the last one was not written; rank 0 has a failed commit first"""
        self.failed_saves = 0
        """in a row; rank 0 has it first"""
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._part: Future[FileDigest | None] | None = None
        self._commit: Future[None] | None = None
        self._step = -1
        self._facts: dict[str, Any] = {}
        self._told: tuple[int, str | None] = (-1, None)

    def start(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `step`; one that is still being written is settled first.

        tensors  that this rank owns, on the CPU and not changed from here on
        facts    JSON values for the manifest; rank 0's count
        """
        self.settle()
        self._step, self._facts = step, dict(facts)
        path = self._path(step)
        own = dict(tensors)
        self._part = self._pool.submit(_retried, lambda: self._write_part(path, own), path)

    @property
    def state(self) -> SaveState:
        if self._commit is not None:
            if not self._commit.done():
                return SaveState.WRITING
            self._finish_commit()
        if self._part is None:
            return SaveState.IDLE
        if not self._part.done():
            return SaveState.WRITING
        return SaveState.FAILED if self._part.exception() else SaveState.WRITTEN

    def advance(self, saving: SaveState, committed_step: int) -> None:
        """Commit, or give up, once all ranks have written their file or failed.

        saving          what the ranks agreed on
        committed_step  newest that rank 0 has committed
        """
        self.note(committed_step)
        if self._part is not None and saving in (SaveState.WRITTEN, SaveState.FAILED):
            self._resolve()

    def settle(self) -> None:
        """Wait until no checkpoint is being written on any rank."""
        if self._part is not None:
            self._part.exception()
            self._resolve()
        if self._commit is not None:
            self._commit.exception()
            self._finish_commit()
        committed_step, self.failure, self.failed_saves = self.world.broadcast_object(
            (self.committed_step, self.failure, self.failed_saves)
        )
        self.note(committed_step)

    def note(self, committed_step: int) -> None:
        """Take over what rank 0 has committed."""
        if committed_step > self.committed_step:
            self.committed_step = committed_step
            self.committed = self._path(committed_step)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take this checkpoint as the one that training continues from."""
        self.note(checkpoint.step)
        self._told = (checkpoint.step, None)

    @property
    def given_up(self) -> bool:
        """True once so many saves in a row have failed that training must not continue; rank 0 decides."""
        return self.failed_saves >= self.spec.max_failed_saves

    def wait_until_saved(
        self, save: Callable[[], None], report: Callable[[Event], None], stop_requested: Callable[[], bool]
    ) -> None:
        """Save again after growing pauses until it succeeds, at most for `save_wait_s`. Collective.

        save  begins to write the present state
        A stop on any rank ends the wait; afterwards `failure` holds whether the state is saved.
        """
        waited, pause = 0.0, _FIRST_WAIT_S
        while waited < self.spec.save_wait_s:
            pause = min(pause, self.spec.save_wait_s - waited)
            told = f"{self.failure}; training waits {pause:g} s and saves again"
            report(Event("waiting", self._step, f"{told}, for {self.spec.save_wait_s - waited:g} s at most"))
            time.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, _LONGEST_WAIT_S)
            save()
            self.settle()
            if self.failure is None or any(self.world.all_gather_object(stop_requested())):
                return

    def news(self, step: int) -> list[Event]:
        """Events of saving since the last call."""
        events = []
        if self.committed_step > self._told[0]:
            message = f"checkpoint of step {self.committed_step} is committed"
            facts = {"checkpoint": self.committed, "step": self.committed_step}
            events.append(Event("saved", step, message, facts))
        if self.failure and self.failure != self._told[1]:
            events.append(Event("save_failed", step, self.failure))
        self._told = (self.committed_step, self.failure)
        return events

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _resolve(self) -> None:
        """All ranks are here, each with its part written or failed."""
        assert self._part is not None
        error = self._part.exception()
        mine = f"rank {self.world.rank}: {error}" if error else self._part.result()
        self._part = None
        results = self.world.all_gather_object(mine)
        errors = [result for result in results if isinstance(result, str)]
        if errors:
            self._fail(f"checkpoint of step {self._step} was not written ({'; '.join(errors)})")
        elif self.world.is_main:
            files = [result for result in results if isinstance(result, FileDigest)]
            step, facts = self._step, self._facts
            self._commit = self._pool.submit(
                _retried, lambda: self._write_manifest(step, files, facts), self._path(step)
            )

    def _finish_commit(self) -> None:
        assert self._commit is not None
        error = self._commit.exception()
        self._commit = None
        if error:
            self._fail(f"checkpoint of step {self._step} was not committed ({error})")
        else:
            self.failure, self.failed_saves = None, 0
            self.note(self._step)

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.failed_saves += 1
        logger.error("%s", failure)

    def _path(self, step: int) -> str:
        return storage.join(checkpoints_folder(self.run_dir), f"step-{step}")

    def _write_part(self, path: str, tensors: dict[str, Tensor]) -> FileDigest | None:
        if not tensors:  # more ranks than tensors
            return None
        name = f"part-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        content = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(path, name), content)
        return FileDigest(name, len(content), storage.digest_bytes(content))

    def _write_manifest(self, step: int, files: list[FileDigest], facts: dict[str, Any]) -> None:
        storage.write_manifest(storage.join(self._path(step), MANIFEST), files, format=FORMAT, step=step, **facts)
        try:
            prune(self.run_dir, self.spec.keep_last, self.spec.keep_best)
        except Exception as error:  # file systems raise what they like; this checkpoint is committed all the same
            logger.warning("old checkpoints could not be removed: %s", error)


def _retried(write: Callable[[], T], path: str) -> T:
    return storage.retry(write, path, deadline_s=_OUTAGE_S)


def write_final_weights(
    average: AveragedWeights, world: World, run_dir: str, step: int, facts: Mapping[str, Any]
) -> str:
    """Write weights.safetensors, the average where one is kept; return its path. Collective.

    `RefineDet.from_pretrained` reads it: config, categories and preprocessing are in its metadata.

    Where the run's directory does not take it, a temporary directory of rank 0's machine does.
    """
    path = ""
    with average.applied() as detector:
        if world.is_main:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
            metadata = {"step": str(step), "ema": str(average.decay is not None).lower()}
            metadata |= {name: json.dumps(value) for name, value in facts.items()}
            metadata |= detector_metadata(detector) if isinstance(detector, RefineDet) else {}
            content = safetensors.torch.save(tensors, metadata)
            try:
                path = storage.join(run_dir, WEIGHTS)
                _retried(lambda: storage.write_bytes(path, content), path)
            except Exception as error:
                path = os.path.join(tempfile.mkdtemp(prefix="refinedet-"), WEIGHTS)
                logger.error("the weights cannot be written to %s (%s), so they go to %s", run_dir, error, path)
                storage.write_bytes(path, content)
    return world.broadcast_object(path)
