"""Before the first step: is everything there that a job would otherwise miss hours later? In seconds, on all workers.

Storage that all workers share and can write, shards whose digests hold, room on the devices, the same versions
everywhere, clocks that agree, and one all-reduce across all workers with its bandwidth.
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
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.world import World

if TYPE_CHECKING:
    from refinedet.pipeline.data.index import ShardSet

_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "ray")
_SAMPLED_SHARDS = 2
_REDUCED_BYTES = 32 * 2**20
_REDUCTIONS = 3
_LARGEST_CLOCK_DIFFERENCE_S = 5.0
_LEAST_FREE_DISK_BYTES = 2**30
_GIB = 2**30


@dataclass(frozen=True)
class WorkerFacts:
    """Facts of one worker. Memory is its device's, or on a CPU the machine's; bytes."""

    rank: int
    host: str
    versions: dict[str, str]
    clock: float
    """seconds since 1970, read by all workers at the same moment"""
    device: str
    total_bytes: int
    free_bytes: int
    free_disk_bytes: int
    storage_fault: str | None = None
    """why this worker cannot use the run directory, or None"""
    shards_fault: str | None = None
    sampled_shards: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckOutcome:
    """One line of the verdict: what was checked, what was seen, and the faults, each with its remedy."""

    name: str
    text: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreflightReport:
    """Findings of the workers' checks, the same on all ranks."""

    findings: tuple[CheckOutcome, ...]
    hosts: tuple[str, ...]
    reduce_gb_s: float
    """bandwidth of the all-reduce, GB/s as an algorithm sees it; 0 for a worker alone"""
    seconds: float

    @property
    def faults(self) -> list[str]:
        return [fault for finding in self.findings for fault in finding.faults]

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def raise_faults(self) -> None:
        """UserError with every fault and its remedy, where there is one."""
        if self.faults:
            raise UserError("The preflight found: " + "; ".join(self.faults) + ".")

    def __str__(self) -> str:
        nodes = len(set(self.hosts))
        workers = f"{_counted(len(self.hosts), 'worker')} on {_counted(nodes, 'node')}"
        if self.faults:
            return f"{workers}, {_counted(len(self.faults), 'fault')}: {'; '.join(self.faults)}"
        reduce = f", all-reduce {self.reduce_gb_s:.2f} GB/s" if self.reduce_gb_s else ""
        return f"{workers}: storage, shards, memory, versions and clocks in order{reduce}"


def check_workers(
    world: World, run_dir: str, shards: ShardSet | None, *, memory_bytes: float | None = None
) -> PreflightReport:
    """Check every worker, together; a collective.

    shards        None: not written yet
    memory_bytes  what a worker is estimated to need on its device; None: not checked
    """
    began = time.monotonic()
    sampled, shards_fault = _check_shards(shards, world)
    storage_fault = _check_storage(run_dir, world)
    total, free = _memory(world.device)
    world.barrier()  # so that the clocks are read at the same moment
    everyone = world.all_gather_object(
        WorkerFacts(
            rank=world.rank,
            host=socket.gethostname(),
            versions=_versions(),
            clock=time.time(),
            device=world.device.type,
            total_bytes=total,
            free_bytes=free,
            free_disk_bytes=_free_disk(run_dir),
            storage_fault=storage_fault,
            shards_fault=shards_fault,
            sampled_shards=sampled,
        )
    )
    bandwidth = _reduce_bandwidth(world)
    findings = (
        _judge_workers(everyone),
        judge_storage(everyone, run_dir),
        _judge_shards(everyone, None if shards is None else len(shards)),
        judge_memory(everyone, memory_bytes),
        judge_versions([(facts.host, facts.versions) for facts in everyone]),
        judge_clocks([facts.clock for facts in everyone]),
        _judge_reduce(world.size, bandwidth),
    )
    hosts = tuple(facts.host for facts in everyone)
    return world.broadcast_object(PreflightReport(findings, hosts, bandwidth, time.monotonic() - began))


# --- what the workers' facts come to


def judge_storage(everyone: Sequence[WorkerFacts], run_dir: str) -> CheckOutcome:
    faults = [f"rank {facts.rank} on {facts.host}: {facts.storage_fault}" for facts in everyone if facts.storage_fault]
    least = min(everyone, key=lambda facts: facts.free_disk_bytes)
    if least.free_disk_bytes < _LEAST_FREE_DISK_BYTES:
        faults.append(
            f"rank {least.rank} on {least.host}: the disk of {_place(run_dir)} has {least.free_disk_bytes / 2**20:.0f} "
            "MiB left; make room"
        )
    text = f"{run_dir}: written by every worker, seen by all, {least.free_disk_bytes / _GIB:.1f} GiB free"
    return CheckOutcome("storage", text, tuple(faults))


def judge_memory(everyone: Sequence[WorkerFacts], memory_bytes: float | None) -> CheckOutcome:
    """A worker on CUDA has its device for itself; on a CPU, the workers of a machine share its memory."""
    if memory_bytes is None:
        return CheckOutcome("memory", "not estimated")
    together = Counter(facts.host for facts in everyone)
    faults: list[str] = []
    for facts in everyone:
        shared = 1 if facts.device == "cuda" else together[facts.host]
        needed, what = memory_bytes * shared, "on a device" if facts.device == "cuda" else "on a machine"
        who = f"rank {facts.rank} on {facts.host}"
        if needed > facts.total_bytes:
            faults.append(
                f"{who}: the job needs about {needed / _GIB:.1f} GiB {what} of {facts.total_bytes / _GIB:.1f} GiB; "
                "lower training.micro_batch, or set model.activation_checkpointing"
            )
        elif facts.device == "cuda" and needed > facts.free_bytes:
            faults.append(
                f"{who}: the job needs about {needed / _GIB:.1f} GiB, another process leaves "
                f"{facts.free_bytes / _GIB:.1f} of {facts.total_bytes / _GIB:.1f} GiB on the device; end it"
            )
    tightest = min(everyone, key=lambda facts: facts.total_bytes)
    place = "device" if tightest.device == "cuda" else "machine"
    text = (
        f"about {memory_bytes / _GIB:.1f} GiB a worker; the smallest {place} has "
        f"{tightest.total_bytes / _GIB:.1f} GiB, {tightest.free_bytes / _GIB:.1f} free"
    )
    return CheckOutcome("memory", text, tuple(faults))


def judge_versions(everywhere: Sequence[tuple[str, Mapping[str, str]]]) -> CheckOutcome:
    """everywhere: host, and versions by package name"""
    first, expected = everywhere[0]
    faults = []
    for name in sorted({name for _, versions in everywhere for name in versions}):
        wanted = expected.get(name, "missing")
        others = [(host, found) for host, versions in everywhere if (found := versions.get(name, "missing")) != wanted]
        if others:
            seen = ", ".join(f"{found} on {host}" for host, found in others[:3])
            faults.append(f"{name} is {wanted} on {first}, but {seen}; install the same everywhere")
    text = ", ".join(f"{name} {version}" for name, version in expected.items()) + " everywhere"
    return CheckOutcome("versions", text, tuple(faults))


def judge_clocks(clocks: Sequence[float]) -> CheckOutcome:
    """clocks: seconds, read at the same moment"""
    difference = max(clocks) - min(clocks)
    faults = (
        (f"clocks differ by {difference:.1f} s; synchronise them (NTP)",)
        if difference > _LARGEST_CLOCK_DIFFERENCE_S
        else ()
    )
    return CheckOutcome("clocks", f"within {difference:.2f} s", faults)


def _judge_workers(everyone: Sequence[WorkerFacts]) -> CheckOutcome:
    ranks: dict[str, list[str]] = {}
    for facts in everyone:
        ranks.setdefault(facts.host, []).append(str(facts.rank))
    placed = "; ".join(f"rank {', '.join(numbers)} on {host}" for host, numbers in ranks.items())
    return CheckOutcome("workers", f"{len(everyone)} on {_counted(len(ranks), 'node')}: {placed}")


def _judge_shards(everyone: Sequence[WorkerFacts], count: int | None) -> CheckOutcome:
    if count is None:
        return CheckOutcome("shards", "not written yet; the stage prepare writes them")
    faults = [f"rank {facts.rank} on {facts.host}: {facts.shards_fault}" for facts in everyone if facts.shards_fault]
    sampled = len({shard for facts in everyone for shard in facts.sampled_shards})
    return CheckOutcome("shards", f"{sampled} of {count} read whole, their digests hold", tuple(faults))


def _judge_reduce(workers: int, bandwidth: float) -> CheckOutcome:
    if workers == 1:
        return CheckOutcome("all-reduce", "one worker, nothing to reduce")
    return CheckOutcome("all-reduce", f"{bandwidth:.2f} GB/s: {_REDUCED_BYTES // 2**20} MiB across {workers} workers")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- what one worker finds


def _check_storage(run_dir: str, world: World) -> str | None:
    """Write, and read back; then see what rank 0 wrote. Collective."""
    attempt = world.broadcast_object(uuid.uuid4().hex[:8])
    path, content = storage.join(run_dir, f".preflight-{world.rank}-{attempt}"), os.urandom(64)
    fault = None
    try:
        storage.write_bytes(path, content)
        if storage.read_bytes(path) != content:
            fault = f"the run's directory {run_dir} gives back other bytes than were written; check the storage"
    except OSError as error:
        fault = f"the run's directory {run_dir} cannot be written ({error.strerror or error}); mount it or give its URI"
    written = world.broadcast_object(fault is None)
    first = storage.join(run_dir, f".preflight-0-{attempt}")
    if fault is None and written and not _sees(first):
        fault = (
            f"the run's directory {run_dir} is not the one that rank 0 writes to; set runs= to a directory or URI that "
            "all nodes share"
        )
    world.barrier()
    with suppress(OSError):
        storage.remove(path)
    return fault


def _sees(path: str) -> bool:
    with suppress(OSError):
        storage.list_folder(os.path.dirname(path))  # network file systems look again
        return storage.exists(path)
    return False


def _check_shards(shards: ShardSet | None, world: World) -> tuple[tuple[int, ...], str | None]:
    """A sample of shards, dealt over the ranks and read whole, each once: this rank's numbers, and a fault."""
    if shards is None:
        return (), None
    sampled = random.Random(0).sample(range(len(shards)), min(_SAMPLED_SHARDS * world.size, len(shards)))
    sample = tuple(sampled[world.rank :: world.size])
    for shard in sample:
        url = shards.shard_url(shard)
        try:
            found = storage.digest_file(url)
        except OSError as error:
            reason = error.strerror or error
            return sample, f"the shard {url} cannot be read ({reason}); write it again with `refinedet shard`"
        if found.sha256 != shards.sha256[shard]:
            return sample, f"the shard {url} does not match its digest; remove it and run `refinedet shard`"
    return sample, None


def _place(run_dir: str) -> str:
    """The local directory that fills up: the run's, or where a run behind a URI keeps what is on its way."""
    return run_dir if storage.is_local(run_dir) else tempfile.gettempdir()


def _free_disk(run_dir: str) -> int:
    place = _place(run_dir)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free


def _memory(device: torch.device) -> tuple[int, int]:
    """Total and free bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
