"""Devices of the plan's time model: what they hold, what their vendors state, and the share of it that is assumed."""

from __future__ import annotations

from dataclasses import dataclass

from refinedet.pipeline.inference.devices import PEAK_TFLOPS
from refinedet.pipeline.runs.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Figures of a device for the time model.

    tflops       dense matrix products in bf16 (fp32 on a CPU), TFLOP/s that the vendor states
    utilization  share of it that training and detection reach without a calibration, lower and upper end
    network_gb_s all-reduce bandwidth of one worker within its node, GB/s
    note         what the utilization rests on
    node_gb_s    bandwidth between two nodes, GB/s
    per_node     devices of a node
    fp32_share   of `tflops` in fp32, which a GPU's convolutions compute as TF32
    """

    name: str
    memory_bytes: float
    tflops: float
    utilization: tuple[float, float]
    network_gb_s: float
    note: str
    node_gb_s: float = 1.0
    per_node: int = 8
    fp32_share: float = 0.5

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU core"


@dataclass(frozen=True)
class Speed:
    """Rates that one worker reaches, GFLOP/s, lower and upper end, and what they rest on."""

    training: tuple[float, float]
    detection: tuple[float, float]
    basis: str
    measured: bool = False


_PUBLISHED = (
    "13 %: NVIDIA's published training of ResNeXt-101 32x4d, 6,888 images/s on 8 A100; 40 %: what well-shaped "
    "convolutions reach; this project measured neither"
)
_GPU_UTILIZATION = (0.13, 0.40)
DEVICES = {
    "CPU": Device(
        "CPU core",
        3 * _GIB,
        0.1,
        (0.20, 1.10),
        1.0,
        "jobs measured at 45 to 105 GFLOP/s a core with AVX-512 and bf16, older cores at 20",
        fp32_share=1.0,
    ),
    "A100": Device("A100 80 GB", 79 * _GIB, PEAK_TFLOPS["A100"], _GPU_UTILIZATION, 20, _PUBLISHED, node_gb_s=40),
    "H100": Device("H100 80 GB", 79 * _GIB, PEAK_TFLOPS["H100"], _GPU_UTILIZATION, 40, _PUBLISHED, node_gb_s=80),
    "H200": Device("H200", 139 * _GIB, PEAK_TFLOPS["H200"], _GPU_UTILIZATION, 40, _PUBLISHED, node_gb_s=80),
}


def find_device(name: str) -> Device:
    """The device of a key of DEVICES, in any case of letters; UserError where there is none."""
    if name.upper() not in DEVICES:
        raise UserError(f"There is no device {name!r} in the plan's model; choose one of {', '.join(DEVICES)}.")
    return DEVICES[name.upper()]


def assumed_speed(device: Device, training_precision: str, detection_precision: str, cores: float = 1) -> Speed:
    """The range of a device that was not calibrated.

    cores  of a worker on a CPU
    """

    def ends(precision: str) -> tuple[float, float]:
        half = device.is_gpu and precision != "fp32"
        gflops = device.tflops * 1e3 * (1.0 if half else device.fp32_share) * (1 if device.is_gpu else cores)
        return device.utilization[0] * gflops, device.utilization[1] * gflops

    low, high = device.utilization
    basis = (
        f"{device.name} at {low:.0%} to {high:.0%} of {device.tflops:g} TFLOP/s ({device.note})"
        f"{f', {device.fp32_share:g} of it in fp32' if device.is_gpu else ''}"
    )
    return Speed(ends(training_precision), ends(detection_precision), basis)
