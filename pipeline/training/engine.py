"""The DeepSpeed engine around a detector, and the one function that derives DeepSpeed's config from the spec.

What it adds to DeepSpeed: gradients are averaged when the loop says so, so that the time of it can be told; the loop
sees the gradient's norm before the update and may refuse it; loss scaling for fp16 is alike on all ranks (DeepSpeed's
scaler under torch_autocast decides on every rank, and on every parameter group, for itself).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.training.optimizers import group_parameters, make_optimizer
from refinedet.pipeline.training.world import World
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_BUCKET_ELEMENTS = 50_000_000
"""Gradients are averaged in buckets of this many elements, 200 MB: large enough for any link's bandwidth."""


def resolve_precision(spec: Training, device: torch.device) -> str:
    """fp32, bf16 or fp16. `auto` is bf16 only where the device computes in it natively; emulated it is 12x slower."""
    if spec.precision != "auto":
        return spec.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def deepspeed_config(
    spec: Training, plan: BatchPlan, precision: str, device: torch.device, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's config; the only place that makes one.

    parameters  trainable elements, which bound the buckets
    """
    bucket = max(2, min(_BUCKET_ELEMENTS, parameters + parameters % 2))
    zero: dict[str, Any] = {"stage": spec.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if spec.zero_stage > 0:
        # At stage 1 reduction would no longer be apart from backward, and its gradients need to be complete first.
        zero["overlap_comm"] = spec.zero_stage == 2 and device.type == "cuda" and plan.world_size > 1
        zero["compute_grad_norm"] = spec.gradient_clip is not None  # the loop computes it for its own check
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,  # more where shares differ
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": spec.gradient_clip or 0.0,  # DeepSpeed's own default is 1
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice a step
    }


class Objective(nn.Module):
    """Detector and loss as one module, so that all of a step's forward goes through DeepSpeed's."""

    def __init__(self, detector: nn.Module, loss: Callable[[Any, Sequence[Any]], Any], fp16: bool, tie: bool) -> None:
        super().__init__()
        self.detector = detector
        self.loss = loss
        self.fp16 = fp16
        self.tie = tie
        self.names: tuple[str, ...] = ()
        """of the loss parts, in the order of the second output; known after the first forward"""

    def forward(self, images: Tensor, targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """-> total loss, and total and parts together [P], detached, fp32"""
        device = images.device.type
        with torch.autocast(device, torch.float16) if self.fp16 else nullcontext():
            predictions = self.detector(images, targets)
        with torch.autocast(device, enabled=False):
            losses = self.loss(predictions, targets)
            total = losses.total.float()
        parts = {"total": total, **losses.parts()}
        self.names = tuple(parts)
        values = torch.stack([part.detach().float().reshape(()) for part in parts.values()])
        if self.tie:
            total = _Tie.apply(total, *(parameter for parameter in self.parameters() if parameter.requires_grad))
        return total, values


class _Tie(torch.autograd.Function):
    """Give every parameter a gradient, zero where the graph has none.

    A head that computes only surviving anchors may leave a parameter out on one rank and not on another, where ZeRO 2
    averages gradients as they come.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.shapes]
        return (gradients[0], *zeros)


class _InOrder:
    """Hand gradients to ZeRO 2's buckets in one order on all ranks, the last parameter's first, as they become ready.

    ZeRO 2 fills its buckets in the order in which backward happens to make gradients, and that depends on the graph:
    two parameters that this rank's graph left out come in another order than where it used them, and would be added
    up with each other.
    """

    def __init__(self, optimizer: Any, parameters: Iterable[Tensor]) -> None:
        self._reduce = optimizer.reduce_ready_partitions_and_remove_grads
        self._order = [id(parameter) for parameter in parameters][::-1]
        self._ready: dict[int, tuple[Tensor, int]] = {}
        self._next = 0
        optimizer.reduce_ready_partitions_and_remove_grads = self

    def __call__(self, parameter: Tensor, group: int) -> None:
        self._ready[id(parameter)] = parameter, group
        while self._next < len(self._order) and self._order[self._next] in self._ready:
            self._reduce(*self._ready[self._order[self._next]])
            self._next += 1

    def begin(self) -> None:
        """Before each backward."""
        self._ready.clear()
        self._next = 0


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
    """A step is `forward`, `backward` for each micro-batch, then `reduce`, then `update` or `discard`.

    Where steps may be discarded and training goes on, `remember` comes first.
    """

    def __init__(
        self,
        detector: nn.Module,
        loss: Callable[[Any, Sequence[Any]], Any],
        spec: Training,
        plan: BatchPlan,
        world: World,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.world = world
        self.plan = plan
        self.zero_stage = spec.zero_stage
        self.precision = resolve_precision(spec, world.device)
        self.scale = LossScale(self.precision == "fp16")
        self.detector = detector.to(world.device)
        self.objective = Objective(
            self.detector, loss, self.precision == "fp16", tie=spec.zero_stage == 2 and world.size > 1
        )
        groups = group_parameters(self.objective, spec)
        self.parameters = {name: p for name, p in self.detector.named_parameters() if p.requires_grad}
        self.base_optimizer = make_optimizer(groups, spec, world.device)
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        with _environment(LOCAL_RANK=str(world.device.index or 0)):  # DeepSpeed takes it for the device's index
            self.deepspeed, self.optimizer, *_ = deepspeed.initialize(
                model=self.objective,
                optimizer=self.base_optimizer,
                config=deepspeed_config(spec, plan, self.precision, world.device, elements),
            )
        self.deepspeed.enable_backward_allreduce = False  # `reduce` does it
        shared = spec.zero_stage == 2 and world.size > 1
        self._in_order = _InOrder(self.optimizer, self.parameters.values()) if shared else None
        if spec.channels_last and spec.zero_stage == 0:  # not before: DeepSpeed broadcasts contiguous weights only
            self.detector.to(memory_format=torch.channels_last)  # pyright: ignore
        self.deepspeed.train()
        persistent = self.detector.state_dict(keep_vars=True).values()
        self._buffers = [tensor for tensor in persistent if not isinstance(tensor, nn.Parameter)]
        self._remembered: list[Tensor] | None = None

    def remember(self) -> None:
        """Keep what a forward changes, the running statistics, so that `discard` undoes it."""
        if self._remembered is None:
            self._remembered = [buffer.clone() for buffer in self._buffers]
        else:
            torch._foreach_copy_(self._remembered, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    def forward(self, images: Tensor, targets: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """One micro-batch -> its total loss, and [P] total and parts, detached."""
        return self.deepspeed(images, targets)

    def backward(self, total: Tensor, *, last: bool) -> None:
        """Accumulate a micro-batch's gradient; `last` of the global batch."""
        if self._in_order:
            self._in_order.begin()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(total * self.scale.value if self.scale.enabled else total)

    def reduce(self) -> None:
        """Average gradients over the ranks; after every `backward`. Only ZeRO 2 does any work before the last one."""
        if self.deepspeed.is_gradient_accumulation_boundary() and self.zero_stage < 2:
            for parameter in self.parameters.values():
                if parameter.grad is None:  # alike on all ranks, or buckets would not match
                    parameter.grad = torch.zeros_like(parameter)
        if self.zero_stage > 0 or self.world.size > 1:
            self.deepspeed.allreduce_gradients()

    def squared_norm(self) -> Tensor:
        """This rank's share of the averaged gradient's squared norm, unscaled; the ranks' shares add up to it."""
        norms = torch._foreach_norm(list(self._gradients()))  # pyright: ignore[reportPrivateImportUsage]
        square = torch.stack(norms).double().square().sum() / self.scale.value**2
        return square if self.zero_stage > 0 else square / self.world.size

    def update(self, learning_rate: float) -> None:
        """Take the step."""
        for group in self.base_optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]
        if self.scale.enabled:
            for gradient in self._gradients():
                gradient.mul_(1 / self.scale.value)
        self.deepspeed.step()
        self.scale.update(overflow=False)

    def discard(self) -> None:
        """Forget the gradient instead of taking the step, and what the forward changed, if it was remembered."""
        if self._remembered is not None:
            torch._foreach_copy_(self._buffers, self._remembered)  # pyright: ignore[reportPrivateImportUsage]
        if self.zero_stage > 0:
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.micro_step_id = -1
            for group in list(self.optimizer.averaged_gradients):
                self.optimizer.averaged_gradients[group] = None
                self.optimizer.all_grad_tensors[group] = None
        else:
            self.deepspeed.zero_grad()
        self.scale.update(overflow=True)

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters whose averaged gradient, as far as this rank holds it, is not finite."""
        names = []
        for name, parameter in self.parameters.items():
            if self.zero_stage == 0:
                gradient = parameter.grad
            elif (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
                gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group)  # pyright: ignore
            else:
                gradient = None
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                names.append(name)
        return names

    def momentum(self) -> Iterator[tuple[str, int, Tensor]]:
        """Momentum that this rank holds: parameter name, first element, elements in the parameter's logical order.

        All parameters whole at ZeRO 0; slices of some above. Nothing before the first step.
        """
        for name, parameter in self.parameters.items():
            if self.zero_stage == 0:
                momentum = self.base_optimizer.state[parameter].get("momentum_buffer")
                if momentum is not None:
                    yield name, 0, momentum
            elif (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
                partition = self.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
                momentum = self.base_optimizer.state[partition].get("momentum_buffer")
                if momentum is not None:
                    where = fragment.hp_fragment_address
                    yield name, fragment.lp_fragment_address.start, momentum.narrow(0, where.start, where.numel)

    def load_momentum(self, whole: Callable[[str], Tensor]) -> None:
        """Set the momentum this rank holds; `whole` gives that of a parameter, flat, in logical order."""
        if self.zero_stage == 0:
            for name, parameter in self.parameters.items():
                momentum = torch.empty_like(parameter)
                momentum.copy_(whole(name).view(parameter.shape))
                self.base_optimizer.state[parameter]["momentum_buffer"] = momentum
            return
        for partition in self.optimizer.single_partition_of_fp32_groups:
            self.base_optimizer.state[partition]["momentum_buffer"] = torch.zeros_like(partition, requires_grad=False)
        for name, parameter in self.parameters.items():
            if (fragment := getattr(parameter, "_hp_mapping", None)) is not None:
                partition = self.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
                here, there = fragment.hp_fragment_address, fragment.lp_fragment_address
                self.base_optimizer.state[partition]["momentum_buffer"].narrow(0, here.start, here.numel).copy_(
                    whole(name).narrow(0, there.start, there.numel)
                )

    def close(self) -> None:
        self.deepspeed.destroy()

    def _gradients(self) -> Iterator[Tensor]:
        """Averaged gradients: of all parameters at ZeRO 0, of this rank's partition above."""
        if self.zero_stage > 0:
            for gradients in self.optimizer.averaged_gradients.values():
                yield from gradients or ()
        else:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    yield parameter.grad


def _import_deepspeed() -> Any:
    """Import DeepSpeed without what it does beside that.

    It would import mlflow and pandas for its autotuner (8 s) and torch's compiler for an optimizer of its own (10 s);
    write to stdout; and, on a CPU, compile a shared-memory operator that only inference calls: a minute on the first
    start, behind a lock that a killed build leaves for ever. It asks `__compatible_ops__` whether it can.
    """
    with _without_mlflow(), _without_compiling():
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    own = logging.getLogger("DeepSpeed")
    for handler in list(own.handlers):
        own.removeHandler(handler)
    own.propagate = True
    if not own.filters:
        own.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Functions that are decorated with `torch.compile` stay as they are."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
