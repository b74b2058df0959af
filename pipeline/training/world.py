"""Rank of this process among the workers, and the collectives that all of them call.

A group that exists already is used as it is; else one is made from torchrun's environment, which workers of Ray Train
find too; else this process is a world of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError
from torch import Tensor

T = TypeVar("T")
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """One worker among `size`. Every method is a collective: all ranks call it, in the same order."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Rank 0, the one that writes what is written once. Not a collective."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            self.all_gather(torch.zeros(1, device=self.device))

    def all_gather(self, values: Tensor) -> Tensor:
        """values [K] of every rank -> [size, K], on the device of `values`."""
        if self.size == 1:
            return values[None]
        gathered = values.new_empty(self.size * values.numel())
        dist.all_gather_into_tensor(gathered, values.contiguous())
        return gathered.view(self.size, -1)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, a new tensor, without gradient; values are left as they are."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_gather_object(self, value: T) -> list[T]:
        """Picklable values of all ranks, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, device=self.device)
        return values[0]

    def from_main(self, call: Callable[[], T]) -> T:
        """Return on every rank what `call` returns on rank 0, pickled; an exception there is raised on all ranks."""
        if self.size == 1:
            return call()
        result: Any = None
        fault: Exception | None = None
        if self.is_main:
            try:
                result = call()
            except Exception as error:
                fault = error
        told = fault and (isinstance(fault, UserError), str(fault), type(fault).__name__)
        result, told = self.broadcast_object((result, told))
        if fault:
            raise fault
        if told:
            by_user, message, name = told
            raise UserError(message) if by_user else RuntimeError(f"rank 0: {name}: {message}")
        return result

    def broadcast_(self, tensors: list[Tensor], source: int) -> None:
        """Replace tensors of one dtype by those of rank `source`, packed into one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self.device)
        dist.broadcast(flat, source)
        _scatter_flat(flat, tensors)


@contextmanager
def open_world(device: torch.device | str | None = None) -> Iterator[World]:
    """The world of this process; a process group made here is also ended here.

    device  default: the CUDA device of the local rank where there is one, else the CPU
    """
    local_rank = settings.read_count("LOCAL_RANK", 0)
    if device is None:
        device = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    made_here = not dist.is_initialized()
    if made_here:
        _make_group(device)
    else:
        _share_cores(settings.read_count("LOCAL_WORLD_SIZE", 1))
    settings.suggest("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    if device.type == "cpu":
        settings.suggest("DS_ACCELERATOR", "cpu")
    try:
        yield World(dist.get_rank(), local_rank, dist.get_world_size(), device)
    finally:
        if made_here:
            dist.destroy_process_group()


def _make_group(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if settings.read("RANK") and settings.read("WORLD_SIZE"):
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
        _share_cores(settings.read_count("LOCAL_WORLD_SIZE", dist.get_world_size()))
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=_COLLECTIVE_TIMEOUT)


def _share_cores(local_size: int) -> None:
    """Set this worker's threads so that the workers of a node together have one per core; a user's number stays."""
    if local_size > 1 and settings.read("OMP_NUM_THREADS") is None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))


def _scatter_flat(flat: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
