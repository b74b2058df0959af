"""Parameter groups and the SGD that updates them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.errors import UserError
from torch import nn


def group_parameters(module: nn.Module, spec: Training) -> list[dict[str, Any]]:
    """Trainable parameters, in groups of one learning rate and one weight decay.

    Pretrained layers of the backbone and biases have groups of their own where the spec gives them multipliers. As in
    the Caffe release, what a normalisation adds is no bias: its gain and shift are treated alike. Every group holds
    `lr_multiplier`, with which the learning rate of a step is multiplied.
    """
    shifts, pretrained = set(), set()
    for child in module.modules():
        own = dict(child.named_parameters(recurse=False))
        if "bias" in own and "weight" in own and own["weight"].dim() == 1:
            shifts.add(own["bias"])
        if isinstance(child, RefineDet):
            pretrained |= set(child.pretrained_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = (name.endswith(".bias") or ".biases." in name) and parameter not in shifts
        rate = spec.bias_lr_multiplier if is_bias else 1.0
        if parameter in pretrained:
            rate *= spec.backbone_lr_multiplier
        decay = spec.weight_decay * (spec.bias_decay_multiplier if is_bias else 1.0)
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": rate}
        for (rate, decay), parameters in groups.items()
    ]


def make_optimizer(groups: Iterable[dict[str, Any]], spec: Training, device: torch.device) -> torch.optim.Optimizer:
    if spec.optimizer == "apex_sgd":
        return import_apex_sgd(device)(list(groups), lr=spec.learning_rate, momentum=spec.momentum)
    fused = True if spec.optimizer == "fused_sgd" else None
    return torch.optim.SGD(list(groups), lr=spec.learning_rate, momentum=spec.momentum, fused=fused)


def import_apex_sgd(device: torch.device) -> Any:
    """NVIDIA apex's FusedSGD; UserError with the reason where it cannot be had."""
    remedy = "use training.optimizer=fused_sgd, torch's own, or build apex from github.com/NVIDIA/apex"
    if device.type != "cuda":
        raise UserError(f"training.optimizer=apex_sgd needs CUDA, and this worker is on {device.type}; {remedy}")
    try:
        apex = importlib.import_module("apex")
    except ImportError:
        raise UserError(f"training.optimizer=apex_sgd needs NVIDIA apex, which is not installed; {remedy}") from None
    try:
        return importlib.import_module("apex.optimizers").FusedSGD
    except (ImportError, AttributeError) as error:
        if not hasattr(apex, "normalization") and not hasattr(apex, "multi_tensor_apply"):
            raise UserError(
                f"training.optimizer=apex_sgd needs NVIDIA apex, but the `apex` installed at "
                f"{getattr(apex, '__file__', None) or 'an unknown place'} is another project of that name; "
                f"uninstall it, then {remedy}"
            ) from None
        raise UserError(
            f"training.optimizer=apex_sgd: apex is installed without its CUDA extensions ({error}); {remedy}"
        ) from None
