"""Checkpoints: `checkpoints/step-<n>/` with one part of every rank, and `manifest.json`, written last.

A checkpoint exists when its manifest does. It is written beside training: `CheckpointWriter.start` takes what to save,
a thread writes this rank's part, the ranks tell each other in every step how far they are, and once all parts are
written rank 0 commits. One that cannot be written is reported, and training goes on to the next.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import safetensors.torch
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.storage import FileDigest
from refinedet.pipeline.training.records import Event
from refinedet.pipeline.training.world import World
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.json"
_ATTEMPTS = 4
_FIRST_PAUSE_S = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are as they were written."""

    path: str
    step: int
    manifest: dict[str, Any]

    def parts(self) -> list[str]:
        """Paths of the ranks' parts, in the order of ranks."""
        return [storage.join(self.path, entry["name"]) for entry in self.manifest["files"]]


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was passed over, and why."""

    path: str
    step: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"checkpoint {self.path} is passed over: {'; '.join(self.faults)}"


class SaveState(IntEnum):
    """How far this rank is with the checkpoint being written; exchanged in every step."""

    IDLE = 0
    WRITING = 1
    WRITTEN = 2
    FAILED = 3


def checkpoints_folder(run_dir: str) -> str:
    return storage.join(run_dir, "checkpoints")


def find_checkpoint(run_dir: str) -> tuple[Checkpoint | None, list[Rejected]]:
    """The newest checkpoint that is whole, and the newer ones that are not. Digests are verified: one rank calls it.

    A folder without a manifest was never committed, and is not counted as a fault.
    """
    rejected = []
    for step, path in sorted(_folders(run_dir), reverse=True):
        if not storage.exists(storage.join(path, MANIFEST)):
            logger.info("checkpoint %s was never committed", path)
            continue
        try:
            manifest = storage.read_json(storage.join(path, MANIFEST))
            faults = storage.verify_manifest(path, manifest)
            if manifest["format"] != FORMAT:
                faults.append(f"its format is {manifest['format']}, this version reads {FORMAT}")
        except (ValueError, KeyError, TypeError) as error:
            manifest, faults = {}, [f"{MANIFEST} cannot be read ({error})"]
        if not faults:
            return Checkpoint(path, step, manifest), rejected
        rejected.append(Rejected(path, step, tuple(faults)))
        logger.error("%s", rejected[-1])
    return None, rejected


def set_aside(rejected: Rejected) -> None:
    """Let a damaged checkpoint not count as committed any more; its files stay until newer ones are."""
    storage.write_json(storage.join(rejected.path, REJECTED), {"faults": list(rejected.faults)})
    storage.remove(storage.join(rejected.path, MANIFEST))


def prune(run_dir: str, keep_last: int, keep_best: int) -> None:
    """Remove checkpoints but the newest and those of the best scores; and what is older and was never committed."""
    scores = _scores(run_dir)
    if not scores:
        return
    ranked = sorted((step for step in scores if scores[step] is not None), key=lambda step: (scores[step], step))
    keep = set(sorted(scores)[-keep_last:]) | set(ranked[max(0, len(ranked) - keep_best) :])
    for step, path in _folders(run_dir):
        if step not in keep and step < max(scores):
            storage.remove(storage.join(path, MANIFEST))  # first: half a checkpoint must not count as one
            storage.remove(path)


def best_checkpoint(run_dir: str) -> str | None:
    """The committed checkpoint with the highest score; None without a validation."""
    folders = dict(_folders(run_dir))
    scored = [(score, step) for step, score in _scores(run_dir).items() if score is not None]
    return folders[max(scored)[1]] if scored else None


def _scores(run_dir: str) -> dict[int, float | None]:
    """Score of every committed checkpoint, by step; None where it has none."""
    scores: dict[int, float | None] = {}
    for step, path in _folders(run_dir):
        if storage.exists(storage.join(path, MANIFEST)):
            try:
                scores[step] = storage.read_json(storage.join(path, MANIFEST)).get("score")
            except ValueError:
                scores[step] = None
    return scores


class CheckpointWriter:
    """Writes the checkpoints of one rank. `start` and `settle` are collective; `advance` follows the exchange."""

    def __init__(self, run_dir: str, world: World, keep_last: int, keep_best: int) -> None:
        self.run_dir = run_dir
        self.world = world
        self.keep = (keep_last, keep_best)
        self.committed: str | None = None
        """the newest checkpoint known to be committed; rank 0 knows it first"""
        self.committed_step = -1
        self.failure: str | None = None
        """why the last one was not written"""
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._part: Future[FileDigest] | None = None
        self._commit: Future[None] | None = None
        self._step = -1
        self._facts: dict[str, Any] = {}
        self._told: tuple[int, str | None] = (-1, None)

    def start(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint of `step`; one that is still being written is settled first.

        tensors  of this rank, on the CPU and not changed from here on
        facts    JSON values for the manifest; rank 0's count
        """
        self.settle()
        self._step, self._facts = step, dict(facts)
        path = self._path(step)
        self._part = self._pool.submit(_retried, self._write_part, path, dict(tensors))

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

    def advance(self, states: list[SaveState], committed_step: int) -> None:
        """Commit, or give up, once every rank's `state` says that its part is written or has failed.

        committed_step  what rank 0 says is committed
        """
        self.note(committed_step)
        if self._part is None or SaveState.WRITING in states or SaveState.IDLE in states:
            return
        self._resolve()

    def settle(self) -> None:
        """Wait until no checkpoint is being written on any rank."""
        if self._part is not None:
            self._part.exception()
            self._resolve()
        if self._commit is not None:
            self._commit.exception()
            self._finish_commit()
        self.committed_step, self.failure = self.world.broadcast_object((self.committed_step, self.failure))
        self.note(self.committed_step)

    def note(self, committed_step: int) -> None:
        """Take over what rank 0 says is committed."""
        if committed_step > self.committed_step:
            self.committed_step = committed_step
            self.committed = self._path(committed_step)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Training goes on from this one."""
        self.note(checkpoint.step)
        self._told = (checkpoint.step, None)

    def news(self, step: int) -> list[Event]:
        """What became of saving since the last call."""
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
            self.failure = f"checkpoint of step {self._step} was not written ({'; '.join(errors)})"
            logger.error("%s", self.failure)
        elif self.world.is_main:
            self._commit = self._pool.submit(_retried, self._write_manifest, self._step, results, self._facts)

    def _finish_commit(self) -> None:
        assert self._commit is not None
        error = self._commit.exception()
        self._commit = None
        if error:
            self.failure = f"checkpoint of step {self._step} was not committed ({error})"
            logger.error("%s", self.failure)
        else:
            self.failure = None
            self.note(self._step)

    def _path(self, step: int) -> str:
        return storage.join(checkpoints_folder(self.run_dir), f"step-{step}")

    def _write_part(self, path: str, tensors: dict[str, Tensor]) -> FileDigest:
        name = f"part-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        content = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(path, name), content)
        return FileDigest(name, len(content), storage.digest_bytes(content))

    def _write_manifest(self, step: int, files: list[FileDigest], facts: dict[str, Any]) -> None:
        storage.write_manifest(storage.join(self._path(step), MANIFEST), files, format=FORMAT, step=step, **facts)
        try:
            prune(self.run_dir, *self.keep)
        except Exception as error:  # file systems raise what they like; this checkpoint is committed all the same
            logger.warning("old checkpoints could not be removed: %s", error)


def _retried(write: Any, *arguments: Any) -> Any:
    """Storage fails for moments; only a failure that lasts counts."""
    pause_s = _FIRST_PAUSE_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return write(*arguments)
        except Exception as error:
            if attempt == _ATTEMPTS:
                raise
            logger.warning("writing a checkpoint failed (%s), attempt %d of %d", error, attempt, _ATTEMPTS)
            time.sleep(pause_s)
            pause_s *= 3


def _folders(run_dir: str) -> list[tuple[int, str]]:
    folder = checkpoints_folder(run_dir)
    matches = [(name, re.fullmatch(r"step-(\d+)", name)) for name in storage.list_folder(folder)]
    return [(int(match[1]), storage.join(folder, name)) for name, match in matches if match]
