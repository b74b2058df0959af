"""Gradients of a rank's backward passes, seen as they become ready and before DeepSpeed reduces them."""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Mapping

import torch
from refinedet.pipeline.training.world import World
from torch import Tensor


class GradientMonitor:
    """Order of the last backward pass and, with `norms`, the norms of all passes of a step.

    A parameter's norm is one kernel on the device, without synchronisation.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, norms: bool) -> None:
        self._takes_norms = norms
        self._order = array("I")
        self._norms: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._note, number))
            for number, parameter in enumerate(parameters.values())
        ]

    @property
    def order(self) -> int:
        """Checksum of 16 bits, equal where the order is."""
        return zlib.crc32(self._order.tobytes()) & 0xFFFF

    def start_backward(self) -> None:
        del self._order[:]

    def finite(self, world: World) -> bool:
        """True where the gradients of a step were finite on every rank, and their norm too. Collective; ends the step.

        DeepSpeed divides by the ranks before it adds up, so that the mean of finite gradients is finite.
        """
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms.clear()
        return not world.sum((~norm.isfinite()).float()).item()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, number: int, parameter: Tensor) -> None:
        self._order.append(number)
        if self._takes_norms:
            assert parameter.grad is not None
            self._norms.append(torch.linalg.vector_norm(parameter.grad))
