"""Contents of a checkpoint by name: whole tensors, each written by the rank that owns it.

`weight/NAME`, `momentum/NAME`, `ema/NAME` and `buffer/NAME`; all exact copies, and none of them of one rank only, so
that any number of workers and any ZeRO stage resumes from them. Random numbers need no state: see `seed_everything`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.buffers import persistent_buffers
from refinedet.pipeline.training.ema import AveragedWeights
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.owners import assign_owners
from refinedet.pipeline.training.world import World
from torch import Tensor, nn


def capture_state(engine: Engine, average: AveragedWeights) -> dict[str, Tensor]:
    """Copies, on the CPU, of what this rank owns. Collective."""
    rank = engine.world.rank
    everything = dict(engine.detector.named_parameters()) | dict(persistent_buffers(engine.detector))
    owners = assign_owners({name: tensor.numel() for name, tensor in everything.items()}, engine.world.size)
    tensors = {}
    for name, parameter in engine.detector.named_parameters():
        if owners[name] == rank:
            tensors[f"weight/{name}"] = _copy(parameter)
    for name, buffer in persistent_buffers(engine.detector):
        if owners[name] == rank:
            tensors[f"buffer/{name}"] = _copy(buffer)
    for name, momentum in engine.momentum():
        if owners[name] == rank:
            tensors[f"momentum/{name}"] = _copy(momentum)
    for name, weight in average.own.items():
        tensors[f"ema/{name}"] = _copy(weight)
    return tensors


@torch.no_grad()
def restore_detector(detector: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Set weights and buffers from a checkpoint's tensors; UserError where they are of another model.

    where  the checkpoint's path, for the message
    """
    wanted = {f"weight/{name}": parameter for name, parameter in detector.named_parameters()}
    wanted |= {f"buffer/{name}": buffer for name, buffer in persistent_buffers(detector)}
    for key, target in wanted.items():
        if key not in tensors:
            raise UserError(f"checkpoint {where} holds no {key}: it is of another model")
        if tensors[key].shape != target.shape:
            raise UserError(
                f"{key} is {tuple(tensors[key].shape)} in checkpoint {where} and {tuple(target.shape)} in the model"
            )
        target.copy_(tensors[key])


def broadcast_state(detector: nn.Module, world: World) -> None:
    """Replace weights and buffers by those of rank 0, one message for each dtype. Collective."""
    tensors = [*detector.parameters(), *(buffer for _, buffer in persistent_buffers(detector))]
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        world.broadcast_([tensor for tensor in tensors if tensor.dtype == dtype], source=0)


def select(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Tensors of one kind by their own names, as in `select(tensors, "momentum")`."""
    return {key.removeprefix(f"{kind}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}/")}


def seed_everything(*numbers: int) -> None:
    """Seed the generators of this process from all the numbers together.

    With (seed, rank, step) before every step, what is drawn in a step is a function of them alone: an exact resume
    needs no state of generators.
    """
    words = np.random.SeedSequence(numbers).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
