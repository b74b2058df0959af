"""The number format that a device computes in."""

from __future__ import annotations

import torch


def computes_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies in bf16 natively; emulation is many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast_type(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The type for `torch.autocast`: bf16 or fp16, or None for fp32. `auto` is bf16 where the device computes it."""
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
