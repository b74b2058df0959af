"""The DeepSpeed engine around detector and loss, and the one function that derives DeepSpeed's config from the spec.

DeepSpeed does backward, reduction during backward, accumulation, loss scaling, clipping, and the update of a sharded
optimizer (ZeRO 1 or 2). What is added here:

- the loss is divided by the positives of the global batch, summed over ranks (equation 1);
- a loss that is not finite makes the gradient not finite;
- a gradient that is not finite on one rank is applied on none, with DeepSpeed before 0.19.8 too, which applies it;
- the order in which gradients become ready is checked to be the same on all ranks: DeepSpeed fills its buckets in that
  order, and would add up gradients of different parameters silently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from packaging.version import Version
from refinedet.model.norms import SyncBatchNorm
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.inference.precision import computes_bf16
from refinedet.pipeline.training.buffers import Buffers
from refinedet.pipeline.training.gradients import GradientMonitor
from refinedet.pipeline.training.optimizers import group_parameters, make_optimizer
from refinedet.pipeline.training.world import World
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LossFunction = Callable[[Any, Sequence[Any]], Any]
"""(predictions, targets) -> `LossSums`: sums, their positives, and `divide`, which gives `parts` and `shares`"""
_BUCKET_ELEMENTS = 50_000_000
"""Gradients are reduced in buckets of this many elements, 200 MB: large enough for any link's bandwidth."""
_MOMENTUM = "momentum_buffer"
DEEPSPEED_REFUSES = Version(deepspeed.__version__) >= Version("0.19.8")
"""DeepSpeed takes no step whose gradient is not finite; where it does, `GradientMonitor` and `_drop_refused` do so"""


def resolve_precision(spec: Training, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto` is bf16 only where the device computes in it natively; emulated it is 12x slower."""
    if spec.precision != "auto":
        return spec.precision
    return "bf16" if computes_bf16(device) else "fp32"


def deepspeed_config(spec: Training, plan: BatchPlan, precision: str, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config; the only place that makes one.

    parameters  trainable elements, which bound the buckets
    """
    bucket = max(2, min(_BUCKET_ELEMENTS, parameters + parameters % 2))
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": spec.gradient_clip or 0.0,  # DeepSpeed's own default is 1
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_optimization": {
            "stage": spec.zero_stage,
            "overlap_comm": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice a step
    }


class Objective(nn.Module):
    """Detector and loss as one module, so that all of a step's forward goes through DeepSpeed's."""

    def __init__(self, detector: nn.Module, loss: LossFunction, world: World, fp16: bool, global_batch: int) -> None:
        super().__init__()
        self.global_batch = global_batch
        self.detector = detector
        self.loss = loss
        self.world = world
        self.fp16 = fp16
        self.waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.positives: Tensor | None = None
        """of the whole global batch, where a step has several micro-batches; None: the micro-batch's own"""
        self.accumulation = 1
        self.names: tuple[str, ...] = ()
        """of the loss parts, in the order of the second output; known after the first forward"""
        self.share_names: tuple[str, ...] = ()
        """of the shares of anchors, which follow the loss parts there"""

    def measure_waits(self, waiting: Callable[[], AbstractContextManager[Any]]) -> None:
        """Enter `waiting()` while other ranks are waited for; on a GPU only at the first norm, which aligns them."""
        self.waiting = waiting
        norms = [module for module in self.detector.modules() if isinstance(module, SyncBatchNorm)]
        for norm in norms[:1] if self.world.device.type == "cuda" else norms:
            norm.waiting = waiting

    def forward(self, images: Tensor | None, targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One micro-batch of this rank -> its share of equation 1 over the global batch.

        images   None: no images, and a total of zero that every parameter is part of
        returns  total with gradient; total, parts and shares of anchors [P], detached, fp32. This rank's shares of
                 them add up over the ranks, and their mean is taken over the micro-batches.
        """
        if images is None:
            zero = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
            return zero, zero.detach()
        sums = self.sums(images, targets)
        with torch.autocast(images.device.type, enabled=False):
            if self.positives is None:
                with self.waiting():
                    losses = sums.divide(self.world.sum(sums.positives))
            else:
                losses = sums.divide(self.positives)
            scale = 1 if self.positives is None else self.accumulation
            total = losses.total.float() * scale
        parts = {"total": total, **{name: part * scale for name, part in losses.parts().items()}}
        weight = len(images) * self.accumulation / self.global_batch
        shares = {name: share * weight for name, share in losses.shares().items()}
        self.names, self.share_names = tuple(parts), tuple(shares)
        values = torch.stack([value.detach().float().reshape(()) for value in (*parts.values(), *shares.values())])
        return total * torch.where(total.detach().isfinite(), 1.0, torch.nan), values

    def sums(self, images: Tensor, targets: Sequence[Any]) -> Any:
        """The loss's sums over one micro-batch, before division."""
        device = images.device.type
        with torch.autocast(device, torch.float16) if self.fp16 else nullcontext():
            predictions = self.detector(images, targets)
        with torch.autocast(device, enabled=False):
            return self.loss(predictions, targets)


class LossScale:
    """Dynamic loss scaling for fp16: halved when the gradient overflows, doubled after `patience` steps without."""

    def __init__(self, enabled: bool, patience: int = 2000) -> None:
        self.enabled = enabled
        self.patience = patience
        self.value = 2.0**16 if enabled else 1.0
        self.good_steps = 0

    @property
    def exhausted(self) -> bool:
        """Gradients overflow at any scale: the training has diverged."""
        return self.value < 2.0**-10

    def update(self, overflow: bool) -> None:
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps == self.patience:
            self.value *= 2
            self.good_steps = 0


class Engine:
    """A step is `forward` and `backward` for each of `plan.accumulation` micro-batches, then `step`."""

    def __init__(self, detector: nn.Module, loss: LossFunction, spec: Training, plan: BatchPlan, world: World) -> None:
        self.spec = spec
        self.world = world
        self.plan = plan
        self.precision = resolve_precision(spec, world.device)
        self.scale = LossScale(self.precision == "fp16")
        self.detector = detector.to(world.device)
        self.buffers = Buffers(self.detector)
        self.objective = Objective(self.detector, loss, world, self.precision == "fp16", plan.global_batch)
        self.parameters = {name: p for name, p in self.detector.named_parameters() if p.requires_grad}
        self.base_optimizer = make_optimizer(group_parameters(self.objective, spec), spec, world.device)
        self.gradients = GradientMonitor(self.parameters, norms=not DEEPSPEED_REFUSES)
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        if world.device.type == "cpu":
            set_accelerator(_PlainCpu())
        self.optimizer: Any
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=world.device.index or 0),
            model=self.objective,
            optimizer=self.base_optimizer,
            config=deepspeed_config(spec, plan, self.precision, elements),
        )
        self.deepspeed.train()
        self._applied = True
        self._create_momentum()
        self.base_optimizer.register_step_pre_hook(self._drop_refused)

    @torch.no_grad()
    def count_positives(self, batches: Sequence[tuple[Tensor, Sequence[Any]]]) -> None:
        """Divide the losses of a step's micro-batches by the positives of all of them. Collective.

        Costs a forward pass each: which anchors are positive for the ADM depends on how the ARM refines them.
        """
        statistics = self.buffers.copy()
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            counts = [self.objective.sums(images, targets).positives for images, targets in batches]
        self.buffers.restore(statistics)
        with self.objective.waiting():
            self.objective.positives = self.world.sum(torch.stack(counts).sum(0))
        self.objective.accumulation = len(batches)

    def forward(self, images: Tensor, targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One micro-batch -> as `Objective.forward`."""
        if self.scale.enabled:
            self.optimizer.override_loss_scale(self.scale.value)
        return self.deepspeed(images, targets)

    def backward(self, total: Tensor) -> None:
        """Add a micro-batch's gradient. DeepSpeed takes means over ranks and micro-batches; equation 1 is a sum."""
        self.gradients.start_backward()
        self.deepspeed.backward(total * self.world.size)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch, no more

    def step(self, learning_rate: float) -> bool:
        """Update the weights from the gradient of all micro-batches. False where it was not finite.

        Then weights and momentum are as before; the same on all ranks.
        """
        for group in self.base_optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        self._applied = DEEPSPEED_REFUSES or self.gradients.finite(self.world)
        self.deepspeed.step()
        self._applied &= self.deepspeed.was_step_applied()
        self.scale.update(overflow=not self._applied)
        return self._applied

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses, in the order of `forward`'s second output."""
        return self.objective.names

    @property
    def share_names(self) -> tuple[str, ...]:
        """Names of the shares of anchors, which follow the losses there."""
        return self.objective.share_names

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's gradient before clipping, without the loss scale; inf where it was not finite."""
        norm = self.deepspeed.get_global_grad_norm()
        assert norm is not None
        return float(norm) if self._applied else math.inf

    def non_finite_gradients(self, batches: Sequence[tuple[Tensor, Sequence[Any]]]) -> list[str]:
        """Names of parameters whose gradient on this rank's micro-batches is not finite, computed again. Collective."""
        names: set[str] = set()
        for images, targets in batches:
            total, _ = self.objective(images, targets)
            gradients = torch.autograd.grad(total * self.scale.value, list(self.parameters.values()), allow_unused=True)
            for name, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None and not gradient.isfinite().all():
                    names.add(name)
        return sorted(names)

    def momentum(self) -> Iterator[tuple[str, Tensor]]:
        """Momentum of every parameter, whole, on every rank, one after the other. Collective."""
        if self.spec.momentum:
            for name, parameter in self.parameters.items():
                momentum = safe_get_full_optimizer_state(parameter, _MOMENTUM)
                assert momentum is not None
                yield name, momentum

    def load_momentum(self, values: Mapping[str, Tensor]) -> None:
        """Set the momentum of every parameter; each rank keeps what its partition holds."""
        for name, parameter in self.parameters.items() if self.spec.momentum else ():
            safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), _MOMENTUM)

    def close(self) -> None:
        self.gradients.close()
        self.deepspeed.destroy()

    def _drop_refused(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Hide a refused gradient from the step of a group; weights and momentum without a gradient stay as they are.

        DeepSpeed calls the step once for each group, with this rank's partition of it.
        """
        for group in () if self._applied else optimizer.param_groups:
            for partition in group["params"]:
                partition.grad = None

    def _create_momentum(self) -> None:
        """Create zero momentum, and take one step of no gradient, rate and decay: it links parameters with their state.

        DeepSpeed does so once, after the first group's first step, when that of later groups must be there.
        """
        for group in self.base_optimizer.param_groups if self.spec.momentum else ():
            for partition in group["params"]:
                self.base_optimizer.state[partition][_MOMENTUM] = torch.zeros_like(partition, requires_grad=False)
        decays = [group["weight_decay"] for group in self.base_optimizer.param_groups]
        for group in self.base_optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        for _ in range(self.plan.accumulation):
            zero, _ = self.deepspeed(None, ())
            self.deepspeed.backward(zero)
            self.deepspeed.step()
        for group, decay in zip(self.base_optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class _PlainCpu(CPU_Accelerator):
    """DeepSpeed's CPU without operators that are compiled at the first start: training calls none of them.

    One of them takes a minute, behind a lock that a killed build leaves for ever.
    """

    def create_op_builder(self, op_name: str) -> None:
        return None
