"""What a checkpoint holds of every rank, by parameter name, so that any number of workers and any ZeRO stage reads it.

Tensors of a part: `weight/NAME` and `ema/NAME`, whole, of the parameters this rank owns; `momentum/NAME@START`, the
elements of the flattened parameter from START on; `buffer/NAME` and `rng/KIND`, this rank's own. All exact copies.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from refinedet.pipeline.runs import storage
from refinedet.pipeline.training.checkpoint import Checkpoint
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.world import World
from torch import Tensor, nn


def assign_owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Share things out to ranks, evenly by size: each, largest first, to the rank that has least."""
    loads = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


def capture_state(engine: Engine, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, on the CPU, of this rank's part.

    ema   the averaged weights that this rank keeps
    """
    rank, size = engine.world.rank, engine.world.size
    tensors = {}
    everything = dict(engine.detector.named_parameters())
    owners = assign_owners({name: parameter.numel() for name, parameter in everything.items()}, size)
    for name, parameter in everything.items():
        if owners[name] == rank:
            tensors[f"weight/{name}"] = _copy(parameter)
    for name, start, momentum in engine.momentum():
        if engine.zero_stage > 0 or owners[name] == rank:
            tensors[f"momentum/{name}@{start}"] = _copy(momentum)
    for name, average in ema.items():
        tensors[f"ema/{name}"] = _copy(average)
    for name, buffer in persistent_buffers(engine.detector):
        tensors[f"buffer/{name}"] = _copy(buffer)
    for kind, state in capture_rng(engine.world.device).items():
        tensors[f"rng/{kind}"] = state
    return tensors


class StateReader:
    """The parts of a checkpoint, read as they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.world_size = len(checkpoint.parts())
        self._parts = [_open_part(path) for path in checkpoint.parts()]
        self._where = {key: rank for rank, part in enumerate(self._parts) for key in part.keys()}  # noqa: SIM118

    def load_detector(self, detector: nn.Module, rank: int, world_size: int) -> None:
        """Weights, and buffers: this rank's own where the world has the same size, else the mean of all ranks'."""
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                parameter.copy_(self._get(f"weight/{name}", parameter.shape))
            for name, buffer in persistent_buffers(detector):
                key = f"buffer/{name}"
                if world_size == self.world_size:
                    buffer.copy_(self._parts[rank].get_tensor(key))
                else:
                    buffer.copy_(_mean([part.get_tensor(key) for part in self._parts]))

    def load_momentum(self, engine: Engine) -> None:
        """Every rank fills in what its partition holds."""
        fragments: dict[str, list[tuple[int, str]]] = {}
        for key in self._where:
            if key.startswith("momentum/"):
                name, start = key.removeprefix("momentum/").rsplit("@", 1)
                fragments.setdefault(name, []).append((int(start), key))
        if fragments:
            engine.load_momentum(
                lambda name: torch.cat(
                    [self._get(key).reshape(-1) for _, key in sorted(fragments.get(name, ()))]  # by their start
                )
            )

    def ema(self, name: str) -> Tensor | None:
        return self._get(f"ema/{name}") if f"ema/{name}" in self._where else None

    def load_rng(self, rank: int, world_size: int, device: torch.device) -> bool:
        """Restore this rank's generators; False, and nothing changed, where the world has another size."""
        if world_size != self.world_size:
            return False
        part = self._parts[rank]
        restore_rng(
            {key.removeprefix("rng/"): part.get_tensor(key) for key in part.keys() if key.startswith("rng/")},  # noqa: SIM118
            device,
        )
        return True

    def _get(self, key: str, shape: torch.Size | None = None) -> Tensor:
        if key not in self._where:
            raise ValueError(f"checkpoint {self.checkpoint.path} holds no {key}: it is of another model")
        tensor = self._parts[self._where[key]].get_tensor(key)
        if shape is not None and tensor.shape != shape:
            raise ValueError(
                f"{key} is {tuple(tensor.shape)} in checkpoint {self.checkpoint.path} and {tuple(shape)} in the model"
            )
        return tensor


def capture_rng(device: torch.device) -> dict[str, Tensor]:
    """States of the generators of torch, CUDA, numpy and Python."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states["numpy"] = torch.tensor([*map(int, keys), position, has_gauss], dtype=torch.int64)  # pyright: ignore
    states["numpy_gauss"] = torch.tensor([gauss], dtype=torch.float64)
    version, words, following = random.getstate()
    states["python"] = torch.tensor([version, *words], dtype=torch.int64)
    states["python_gauss"] = torch.tensor([] if following is None else [following], dtype=torch.float64)
    return states


def restore_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    version, *words = states["python"].tolist()
    following = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), following[0] if following else None))


def seed_everything(*numbers: int) -> None:
    """Seed the generators of this process from all the numbers together."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))
    words = np.random.SeedSequence(numbers).generate_state(3)
    np.random.seed(words[1])
    random.seed(int(words[2]))


def mean_buffers(detector: nn.Module, world: World) -> dict[str, Tensor]:
    """Buffers averaged over the ranks (running statistics of batch norm differ), without changing them. Collective."""
    buffers = {name: buffer.detach().clone() for name, buffer in persistent_buffers(detector)}
    world.mean_([buffer for buffer in buffers.values() if buffer.is_floating_point()])
    return buffers


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of the state; the others are constants."""
    kept = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _mean(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack(tensors).double().mean(0).to(tensors[0].dtype)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class _Part:
    """A part from other than a local disk, read whole."""

    def __init__(self, content: bytes) -> None:
        self._tensors = safetensors.torch.load(content)

    def keys(self) -> Iterator[str]:
        return iter(self._tensors)

    def get_tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def _open_part(path: str) -> Any:
    if storage.is_local(path):
        return safetensors.safe_open(storage.filesystem(path)[1], "pt")
    return _Part(storage.read_bytes(path))
