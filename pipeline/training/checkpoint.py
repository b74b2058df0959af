"""Checkpoints: `checkpoints/step-<n>/` with files of whole named tensors, and `manifest.json`, written last.

A checkpoint exists when its manifest does. `saving` writes them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.records import Event
from refinedet.pipeline.training.world import World
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
REJECTED = "rejected.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files are as they were written."""

    path: str
    step: int
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    """all of it, on the CPU of every rank"""


def checkpoints_folder(run_dir: str) -> str:
    return storage.join(run_dir, "checkpoints")


def load_checkpoint(run_dir: str, world: World, on_event: Callable[[Event], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, on every rank; None without one. Collective.

    The files are dealt over the ranks: each is read and verified by one rank and broadcast to the others. One with a
    fault is set aside, reported by on_event, and the one before is taken. UserError for a format of another version.
    """

    def set_aside(path: str, step: int, faults: list[str]) -> None:
        message = f"checkpoint {path} is passed over: {'; '.join(faults)}"
        logger.error("%s", message)
        on_event(Event("passed_over", step, message, {"checkpoint": path, "faults": faults}))
        if world.is_main:  # it must not count as committed any more; its files stay until newer ones are
            storage.write_json(storage.join(path, REJECTED), {"faults": faults})
            storage.remove(storage.join(path, MANIFEST))
        world.barrier()

    return _load_newest(run_dir, world, set_aside)


def load_fork(run_dir: str, world: World) -> Checkpoint:
    """The newest checkpoint of another run, in which nothing is changed, on every rank. Collective.

    UserError where it has none that is whole: an older one would be another start than requested.
    """

    def refuse(path: str, step: int, faults: list[str]) -> None:
        raise UserError(
            f"training.fork_from: checkpoint {path} is damaged ({'; '.join(faults)}); resume that run first."
        )

    checkpoint = _load_newest(run_dir, world, refuse)
    if checkpoint is None:
        raise UserError(f"training.fork_from: {run_dir!r} holds no checkpoint; give the directory of a run with one.")
    return checkpoint


def _load_newest(run_dir: str, world: World, on_fault: Callable[[str, int, list[str]], None]) -> Checkpoint | None:
    """The newest whole checkpoint, after `on_fault` was called on all ranks for every newer one. Collective."""
    committed = sorted(_folders(run_dir), reverse=True) if world.is_main else []
    for step, path in world.broadcast_object(committed):
        manifest, faults = world.broadcast_object(_read_manifest(path) if world.is_main else (None, []))
        if manifest is None and not faults:
            logger.info("checkpoint %s was never committed", path)
            continue
        if manifest is not None:
            _check_format(path, manifest)
            contents, faults = _read_files(path, manifest, world)
            if not faults:
                return Checkpoint(path, step, manifest, _broadcast_files(contents, manifest, world))
        on_fault(path, step, faults)
    return None


def _read_manifest(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Manifest and faults; (None, []) where the checkpoint was never committed."""
    if not storage.exists(storage.join(path, MANIFEST)):
        return None, []
    try:
        manifest = storage.read_json(storage.join(path, MANIFEST))
        if manifest["format"] == FORMAT:
            [(entry["name"], entry["size"], entry["sha256"]) for entry in manifest["files"]]
        return manifest, []
    except (ValueError, KeyError, TypeError) as error:
        return None, [f"{MANIFEST} cannot be read ({error})"]


def _check_format(path: str, manifest: Mapping[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {manifest['format']} of another version of refinedet, and this one reads "
            f"format {FORMAT}; start a run of another name (name=OTHER), or resume with the version that wrote it"
        )


def _read_files(path: str, manifest: Mapping[str, Any], world: World) -> tuple[dict[int, bytes], list[str]]:
    """This rank's share of the files, by number, and the faults of all files on all ranks. Collective.

    OSError, on all ranks, where storage does not answer: the checkpoint may be whole.
    """
    contents: dict[int, bytes] = {}
    faults: list[str] = []
    errors: list[str] = []
    for number in range(world.rank, len(manifest["files"]), world.size):
        entry = manifest["files"][number]
        try:
            contents[number] = storage.read_bytes(storage.join(path, entry["name"]))
        except FileNotFoundError:
            faults.append(f"{entry['name']} is missing")
        except Exception as error:  # a library of remote storage raises what it likes
            errors.append(f"rank {world.rank}: {entry['name']}: {error}")
        else:
            faults += _check_file(contents[number], entry)
    told = world.all_gather_object((faults, errors))
    if failed := [error for _, errors in told for error in errors]:
        raise OSError(f"checkpoint {path} cannot be read now ({'; '.join(failed)}); run the same command again")
    return contents, [fault for faults, _ in told for fault in faults]


def _check_file(content: bytes, entry: Mapping[str, Any]) -> list[str]:
    if len(content) != entry["size"]:
        return [f"{entry['name']} has {len(content)} bytes, the manifest has {entry['size']}"]
    if storage.digest_bytes(content) != entry["sha256"]:
        return [f"{entry['name']} does not match its digest"]
    return []


def _broadcast_files(contents: Mapping[int, bytes], manifest: Mapping[str, Any], world: World) -> dict[str, Tensor]:
    """All tensors on every rank; each file from the rank that has read it. Collective."""
    tensors: dict[str, Tensor] = {}
    for number in range(len(manifest["files"])):
        source = number % world.size
        mine = safetensors.torch.load(contents[number]) if number in contents else {}
        shapes = world.broadcast_object({key: (t.shape, t.dtype) for key, t in mine.items()}, source)
        for dtype in sorted({dtype for _, dtype in shapes.values()}, key=str):
            keys = [key for key in shapes if shapes[key][1] == dtype]
            found = [mine[key] if key in mine else torch.empty(shapes[key][0], dtype=dtype) for key in keys]
            world.broadcast_(found, source)
            tensors.update(zip(keys, found, strict=True))
    return tensors


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


def _folders(run_dir: str) -> list[tuple[int, str]]:
    folder = checkpoints_folder(run_dir)
    matches = [(name, re.fullmatch(r"step-(\d+)", name)) for name in storage.list_folder(folder)]
    return [(int(match[1]), storage.join(folder, name)) for name, match in matches if match]
