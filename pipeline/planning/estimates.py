"""The plan's time and memory model: one worker and one step, a whole job, and its price."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from refinedet.model.config import RefineDetConfig
from refinedet.model.cost import ModelCost
from refinedet.pipeline.config.batches import BatchPlan, training_sizes
from refinedet.pipeline.config.spec import JobSpec, Training
from refinedet.pipeline.planning.device_speeds import Device

_GIB = 2**30
_BACKWARD_SHARE = 2 / 3  # of a step's compute, behind which gradients are reduced
_HALF_PRECISION_ACTIVATIONS = 0.55  # of fp32's: what batch normalisation keeps stays fp32
_WORKSPACE_BYTES = 1.5 * _GIB  # CUDA context, cuDNN workspaces, fragments
RESTART_S = 180.0
"""from a node's loss to the first step after it: placement, imports, the checkpoint"""


def largest_training_model(spec: JobSpec) -> RefineDetConfig:
    """The job's detector at the largest size that it is trained at: what it needs is estimated there."""
    return replace(spec.model, input_size=max(training_sizes(spec)), num_levels=spec.model.levels)


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker needs on its device."""

    state_bytes: float
    activation_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.state_bytes + self.activation_bytes + self.workspace_bytes


def estimate_memory(cost: ModelCost, training: Training, batch: BatchPlan, device: Device) -> Memory:
    """Memory of one worker of `batch.world_size`.

    State: fp32 weights, gradients and momentum, the last one (ZeRO 1) or two (ZeRO 2) shared by the workers, and the
    average of the weights where it is kept. Precision: auto is bf16 on a GPU, fp32 on a CPU.
    """
    weights = 4.0 * cost.total_parameters
    momentum = weights / (batch.world_size if training.zero_stage >= 1 else 1)
    gradients = weights / (batch.world_size if training.zero_stage >= 2 else 1)
    average = weights if training.ema_decay else 0.0
    half = device.is_gpu and training.precision != "fp32"
    return Memory(
        state_bytes=weights + momentum + gradients + average,
        activation_bytes=cost.activation_bytes * batch.micro_batch * (_HALF_PRECISION_ACTIVATIONS if half else 1.0),
        workspace_bytes=_WORKSPACE_BYTES if device.is_gpu else 0.3 * _GIB,
    )


def training_gflops(model: RefineDetConfig, cost: ModelCost, training: Training) -> float:
    """GFLOPs of one image of training, every anchor computed."""
    return cost.training_gflops(
        backbone_trained=training.backbone_lr_multiplier != 0, recomputed=model.activation_checkpointing
    )


@dataclass(frozen=True)
class Step:
    """Estimate of one step."""

    compute_s: float
    communication_s: float

    @property
    def seconds(self) -> float:
        """Communication is hidden behind the backward pass, but for what is longer than it."""
        return self.compute_s + max(0.0, self.communication_s - self.compute_s * _BACKWARD_SHARE)


def estimate_step(
    gflops: float, rate: float, cost: ModelCost, batch: BatchPlan, device: Device, nodes: int = 1
) -> Step:
    """Time of one step of `batch.world_size` workers on `nodes` machines.

    gflops  of one image of training
    rate    GFLOP/s that one worker reaches
    Communication: a ring over the workers of a node, then one over the nodes, through which every gradient goes once
    each way.
    """
    images = math.ceil(batch.global_batch / batch.world_size)
    weights = 4.0 * cost.total_parameters
    communication = 0.0
    if batch.world_size > 1:
        within = math.ceil(batch.world_size / nodes)
        communication = 2 * weights * (within - 1) / within / (device.network_gb_s * 1e9)
        communication += 2 * weights * (nodes - 1) / nodes / (device.node_gb_s * 1e9)
    return Step(images * gflops / rate, communication)


@dataclass(frozen=True)
class Workload:
    """Amount of work of a job, whatever it runs on.

    steps            0: not known
    forward_gflops   of one image of detection
    validated        images of all validations together
    evaluated        images of the evaluate stage
    multiscale_cost  of the multiscale stage, in evaluate stages
    save_every       steps between two saves
    """

    steps: int
    forward_gflops: float
    validated: int
    evaluated: int
    multiscale_cost: float
    save_every: int


@dataclass(frozen=True)
class Duration:
    """Seconds of a whole job at one end of the range."""

    training_s: float
    validation_s: float
    evaluation_s: float
    multiscale_s: float
    failures: float
    """losses of a node that are expected on the way"""
    failures_s: float

    @property
    def total_s(self) -> float:
        return self.training_s + self.validation_s + self.evaluation_s + self.multiscale_s + self.failures_s


def estimate_duration(
    work: Workload, step_s: float, detection_rate: float, nodes: int, node_mtbf_hours: float
) -> Duration:
    """Seconds of every part of a job.

    detection_rate   GFLOP/s of all workers together
    node_mtbf_hours  between two losses of one node; each costs half the interval between two saves, and a restart
    """
    image_s = work.forward_gflops / detection_rate
    training, validation = work.steps * step_s, work.validated * image_s
    losses = nodes * (training + validation) / 3600 / node_mtbf_hours
    return Duration(
        training_s=training,
        validation_s=validation,
        evaluation_s=work.evaluated * image_s,
        multiscale_s=work.evaluated * image_s * work.multiscale_cost,
        failures=losses,
        failures_s=losses * (work.save_every * step_s / 2 + RESTART_S),
    )
