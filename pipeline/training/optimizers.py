"""Parameter groups and the SGD that updates them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.errors import UserError
from torch import nn


def group_parameters(module: nn.Module, spec: Training) -> list[dict[str, Any]]:
    """Trainable parameters; biases apart where the spec gives them multipliers of their own.

    As in the Caffe release, what a normalisation adds is none of them: its gain and shift are treated alike. Every
    group holds `lr_multiplier`, which the learning rate of a step is multiplied with.
    """
    shifts = set()
    for child in module.modules():
        own = dict(child.named_parameters(recurse=False))
        if "bias" in own and "weight" in own and own["weight"].dim() == 1:
            shifts.add(own["bias"])
    weights, biases = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_bias = name.endswith(".bias") or ".biases." in name
            (biases if is_bias and parameter not in shifts else weights).append(parameter)
    if spec.bias_lr_multiplier == 1 and spec.bias_decay_multiplier == 1:
        order = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return [{"params": order, "weight_decay": spec.weight_decay, "lr_multiplier": 1.0}]
    groups = [
        {"params": weights, "weight_decay": spec.weight_decay, "lr_multiplier": 1.0},
        {
            "params": biases,
            "weight_decay": spec.weight_decay * spec.bias_decay_multiplier,
            "lr_multiplier": spec.bias_lr_multiplier,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: Iterable[dict[str, Any]], spec: Training, device: torch.device) -> torch.optim.Optimizer:
    if spec.optimizer == "apex_sgd":
        return import_apex_sgd(device)(list(groups), lr=spec.learning_rate, momentum=spec.momentum)
    fused = True if spec.optimizer == "fused_sgd" else None
    return torch.optim.SGD(list(groups), lr=spec.learning_rate, momentum=spec.momentum, fused=fused)


def import_apex_sgd(device: torch.device) -> Any:
    """NVIDIA apex's FusedSGD; UserError that says what is wrong where it cannot be had."""
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
