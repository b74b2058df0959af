"""Batch normalisation: per worker, synchronised, or frozen.

B images, F channels, H W cells, R ranks
"""

# timm's `convert_sync_batchnorm` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Every public batch normalisation; timm's norms with an activation derive from them.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
AnyBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that survives one value a channel.

    The coarsest level of a small input is one cell; with one image per batch there is no variance, and torch
    raises. The running statistics stand in. Momentum is torch's 0.1: 0.001 per step, as in the Caffe release,
    needs thousands of steps before evaluation sees what training saw.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return normalize_by_running(self, input)
        return super().forward(input)


def normalize_by_running(norm: AnyBatchNorm, x: Tensor) -> Tensor:
    """Normalise by the running statistics, whatever the mode of `norm`."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def normalize_by_batch(norm: AnyBatchNorm, x: Tensor) -> Tensor:
    """Batch normalisation of one worker, as `nn.BatchNorm2d.forward`; running statistics in evaluation."""
    if not norm.training:
        return normalize_by_running(norm, x)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, momentum, norm.eps)


class SyncBatchNorm(nn.SyncBatchNorm):
    """Statistics over all ranks' batches: torch's own on a GPU, plain PyTorch on a CPU, where torch has none.

    On a CPU one rank computes as several do. torch's `batch_norm` sums squares there: on maps of one cell the gradient
    of the smallest detector was off by 1e-3, against 3e-6 here (fp32 beside fp64).
    """

    waiting: Callable[[], AbstractContextManager[Any]] = staticmethod(nullcontext)
    """entered while other ranks are waited for, so that their time is not taken for this rank's"""

    def forward(self, input: Tensor) -> Tensor:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if not self.training or (ranks == 1 and input.numel() == input.shape[1]):
            return normalize_by_running(self, input)
        if input.device.type != "cpu":
            if ranks == 1 or input.device.type == "meta":  # where costs are counted, there is nothing to gather
                return normalize_by_batch(self, input)
            with self.waiting():
                return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        count = x.new_full((1,), x.shape[0] * x.shape[2] * x.shape[3])
        mean = x.mean(dim=(0, 2, 3))
        squares = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        # Each rank's (mean, sum of squared deviations, count), combined as if the batches were one.
        parts: Tensor
        part = torch.cat([mean, squares, count])
        if ranks > 1:
            with self.waiting():
                parts = _GatherRows.apply(part)
        else:
            parts = part[None]
        means, all_squares, counts = torch.split(parts, [len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (all_squares + counts * (means - mean).square()).sum(0) / total
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            cast(Tensor, self.running_mean).lerp_(mean, momentum)
            cast(Tensor, self.running_var).lerp_(variance * total / (total - 1), momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        y = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


class _GatherRows(torch.autograd.Function):
    """[F] on every rank -> [R, F] on every rank, with the gradient summed over ranks."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def synchronize_norms(module: nn.Module) -> None:
    """Replace every batch normalisation inside `module` by the synchronised one."""
    from timm.layers import norm_act  # slow to import, and rarely needed

    for name, child in module.named_children():
        if not isinstance(child, BATCH_NORMS):
            synchronize_norms(child)
            continue
        converted = cast(nn.Module, norm_act.convert_sync_batchnorm(child))
        # Same fields; works on a CPU too.
        plain = type(converted) is nn.SyncBatchNorm
        converted.__class__ = SyncBatchNorm if plain else _with_activation(type(converted))
        setattr(module, name, converted)


@functools.cache
def _with_activation(converted: type[nn.Module]) -> type[SyncBatchNorm]:
    """timm's norm with an activation, around the norm of this module."""
    bases: tuple[type, ...] = (converted, SyncBatchNorm)
    return type(converted.__name__, bases, {})  # pyright: ignore[reportGeneralTypeIssues]


def freeze_norms(module: nn.Module) -> None:
    """Make every batch normalisation inside `module` a fixed affine map; again after each `train()`."""
    for child in module.modules():
        if isinstance(child, BATCH_NORMS):
            child.eval().requires_grad_(False)


@contextmanager
def hold_statistics(module: nn.Module) -> Generator[None]:
    """Leave running statistics alone: activation checkpointing runs forward twice, which must count once."""
    norms = [(child, child.momentum) for child in module.modules() if isinstance(child, BATCH_NORMS)]
    for child, _ in norms:
        child.momentum = 0.0
    try:
        yield
    finally:
        for child, momentum in norms:
            child.momentum = momentum
