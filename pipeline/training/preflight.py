"""Before the first step: is everything there that a job would otherwise miss hours later? In seconds, on all workers.

Storage that every worker can write, shards whose digests hold, the same versions everywhere, clocks that agree, room
on the device, and one all-reduce across all workers with its bandwidth.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import shutil
import socket
import tempfile
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.errors import UserError
from pipeline.training.world import World

if TYPE_CHECKING:
    from pipeline.data import ShardSet

_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset")
_SAMPLED_SHARDS = 2
_REDUCED_BYTES = 32 * 2**20
_REDUCTIONS = 3
_LARGEST_CLOCK_DIFFERENCE_S = 5.0
_LEAST_FREE_DISK_BYTES = 2**30


@dataclass(frozen=True)
class WorkerFacts:
    """What one worker says of itself."""

    rank: int
    host: str
    versions: tuple[tuple[str, str], ...]
    clock: float
    fault: str | None
    """why this worker cannot do its part, or None"""


@dataclass(frozen=True)
class PreflightReport:
    """All is well. `reduce_gb_s` is the bandwidth of the all-reduce, GB/s as an algorithm sees it; 0 alone."""

    hosts: tuple[str, ...]
    clock_difference_s: float
    reduce_gb_s: float
    seconds: float

    def __str__(self) -> str:
        nodes = len(set(self.hosts))
        workers = f"{_counted(len(self.hosts), 'worker')} on {_counted(nodes, 'node')}"
        reduce = f", all-reduce {self.reduce_gb_s:.2f} GB/s" if self.reduce_gb_s else ""
        return f"{workers}, storage, shards, versions and clocks in order{reduce}"


def check_workers(
    world: World, run_dir: str, shards: ShardSet, *, memory_bytes: float | None = None
) -> PreflightReport:
    """Check every worker, together; a collective.

    memory_bytes  what a worker is estimated to need on its device; None: not checked
    Raises UserError, on all ranks alike, naming every rank and host at fault and the remedy.
    """
    began = time.monotonic()
    fault = (
        _storage_fault(run_dir, world.rank) or _shards_fault(shards, world.rank) or _device_fault(world, memory_bytes)
    )
    world.barrier()  # so that the clocks are read at the same moment
    mine = WorkerFacts(world.rank, socket.gethostname(), _versions(), time.time(), fault)
    everyone = world.all_gather_object(mine)
    faults = [f"rank {facts.rank} on {facts.host}: {facts.fault}" for facts in everyone if facts.fault]
    faults += _version_faults(everyone)
    difference = max(facts.clock for facts in everyone) - min(facts.clock for facts in everyone)
    if difference > _LARGEST_CLOCK_DIFFERENCE_S:
        faults.append(f"the clocks of the workers differ by {difference:.1f} s; synchronise them (NTP)")
    if faults:
        raise UserError("The preflight found: " + "; ".join(faults) + ".")
    bandwidth = _reduce_bandwidth(world)
    return PreflightReport(tuple(facts.host for facts in everyone), difference, bandwidth, time.monotonic() - began)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _storage_fault(run_dir: str, rank: int) -> str | None:
    path = storage.join(run_dir, f".preflight-{rank}-{uuid.uuid4().hex[:8]}")
    content = os.urandom(64)
    try:
        storage.write_bytes(path, content)
        same = storage.read_bytes(path) == content
        storage.remove(path)
    except OSError as error:
        return f"the run's folder {run_dir} cannot be written ({error.strerror or error}); mount it or give its URI"
    if not same:
        return f"the run's folder {run_dir} gives back other bytes than were written; check the storage"
    place = run_dir if storage.is_local(run_dir) else tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < _LEAST_FREE_DISK_BYTES:
        return f"{place} has {free / 2**20:.0f} MiB left; make room"
    return None


def _shards_fault(shards: ShardSet, rank: int) -> str | None:
    """A sample of shards, another one on every rank, read whole."""
    for shard in random.Random(rank).sample(range(len(shards)), min(_SAMPLED_SHARDS, len(shards))):
        url = shards.shard_url(shard)
        try:
            found = storage.digest_file(url)
        except OSError as error:
            return f"the shard {url} cannot be read ({error.strerror or error}); write it again with `refinedet shard`"
        if found.sha256 != shards.sha256[shard]:
            return f"the shard {url} does not match its digest; remove it and write it again with `refinedet shard`"
    return None


def _device_fault(world: World, memory_bytes: float | None) -> str | None:
    if memory_bytes is None or world.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(world.device)
    if memory_bytes > total:
        return (
            f"the job needs about {memory_bytes / 2**30:.1f} GiB on a device of {total / 2**30:.1f} GiB; lower "
            "training.micro_batch, or set model.activation_checkpointing"
        )
    if memory_bytes > free:
        return (
            f"the job needs about {memory_bytes / 2**30:.1f} GiB, another process leaves {free / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB on the device; end it"
        )
    return None


def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "missing"))
    return tuple(found)


def _version_faults(everyone: list[WorkerFacts]) -> list[str]:
    faults = []
    for position, (name, expected) in enumerate(everyone[0].versions):
        others = [facts for facts in everyone if facts.versions[position][1] != expected]
        if others:
            seen = ", ".join(f"{facts.versions[position][1]} on {facts.host}" for facts in others[:3])
            faults.append(f"{name} is {expected} on {everyone[0].host}, but {seen}; install the same everywhere")
    return faults


def _reduce_bandwidth(world: World) -> float:
    if world.size == 1:
        return 0.0
    values = torch.ones(_REDUCED_BYTES // 4, device=world.device)
    fastest = float("inf")
    for _ in range(_REDUCTIONS):
        world.barrier()
        began = time.monotonic()
        dist.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        fastest = min(fastest, time.monotonic() - began)
    return _REDUCED_BYTES / fastest / 1e9
