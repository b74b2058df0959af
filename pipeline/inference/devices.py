"""Accelerators that this project has figures of, and the rate that their vendors state."""

from __future__ import annotations

import os
import re
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING

from refinedet.pipeline.runs.errors import UserError

if TYPE_CHECKING:
    import torch

PEAK_TFLOPS = MappingProxyType({"A100": 312.0, "H100": 989.0, "H200": 989.0})
"""Dense matrix products in bf16 or fp16 of the SXM modules, TFLOP/s, as NVIDIA states them."""

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""made by the drivers of NVIDIA, of AMD, and of Windows for its Linux"""


def check_device_name(name: str | None) -> None:
    """UserError for what is no name of a device, and for a GPU where Linux has the driver of none; without torch."""
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"The device must be cpu, cuda or cuda:N, received {name!r}.")
    if name not in (None, "cpu") and sys.platform == "linux" and not any(map(os.path.exists, _DRIVERS)):
        raise UserError(f"The device {name!r} needs a GPU, and there is none here; leave it out, or give cpu.")


def accelerator_key(device: torch.device) -> str | None:
    """The device's key in PEAK_TFLOPS; None for a CPU and for a GPU that is not in it."""
    if device.type != "cuda":
        return None
    import torch  # commands read the table before they need torch, which takes seconds

    name = torch.cuda.get_device_name(device)
    return next((key for key in PEAK_TFLOPS if key in name), None)


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the vendor states in bf16; None for a CPU, whose clock and units vary, and an unknown GPU."""
    key = accelerator_key(device)
    return PEAK_TFLOPS[key] * 1e12 if key else None
