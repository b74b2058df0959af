"""An exponential moving average of the weights, each rank keeping that of the parameters it owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from refinedet.pipeline.training.owners import assign_owners
from refinedet.pipeline.training.world import World
from torch import Tensor, nn


class AveragedWeights:
    """Without a decay it keeps nothing, and stands for the weights themselves."""

    def __init__(self, detector: nn.Module, decay: float | None, world: World) -> None:
        self.detector = detector
        self.decay = decay
        self.world = world
        sizes = {name: parameter.numel() for name, parameter in detector.named_parameters()}
        self.owners = assign_owners(sizes, world.size)
        self.own: dict[str, Tensor] = {}
        if decay is not None:
            for name, parameter in detector.named_parameters():
                if self.owners[name] == world.rank:
                    self.own[name] = parameter.detach().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, from 0. The first steps count more, or the start would stay in the average."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(self.detector.named_parameters())
        for name, average in self.own.items():
            average.lerp_(parameters[name].detach(), 1 - decay)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the averages of a checkpoint; a parameter that it has none of starts from its weight."""
        for name, average in self.own.items():
            if name in saved:
                average.copy_(saved[name])

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """The averages of all parameters, or the weights where none are kept, on every rank. Collective."""
        weights = {name: parameter.detach().clone() for name, parameter in self.detector.named_parameters()}
        if self.decay is None:
            return weights
        for rank in range(self.world.size):
            names = [name for name in weights if self.owners[name] == rank]
            for name in names if rank == self.world.rank else ():
                weights[name].copy_(self.own[name])
            self.world.broadcast_([weights[name] for name in names], source=rank)
        return weights

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The detector in eval mode, with averaged weights. Collective."""
        before = {name: parameter.detach().clone() for name, parameter in self.detector.named_parameters()}
        self._assign(self.gather())
        self.detector.eval()
        try:
            yield self.detector
        finally:
            self.detector.train()
            self._assign(before)

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.detector.named_parameters():
            parameter.copy_(values[name])
