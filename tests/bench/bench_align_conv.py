"""AlignConv beside what it replaces, in one run: the vanilla convolution, torchvision's `deform_conv2d`, the roofline.

    python -m tests.bench.bench_align_conv [--device cuda --dtype bfloat16] [--json OUT]

Every repetition runs every case once, so that a busy machine slows all of them alike; the ratios are of medians. The
peers do the same work: all levels, all aspects, location and class outputs together. torchvision gets its offsets ready
made, and computes bf16 in fp16. `bench_detector` measures whole detectors.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from refinedet.model.ops import library
from refinedet.model.ops.align_conv import align_conv
from torch import Tensor
from torch.nn import functional
from torchvision.ops import deform_conv2d

from tests.bench.record import describe_where, save_result

ASPECTS = ((1.0, 1.0), (2.0**0.5, 0.5**0.5), (0.5**0.5, 2.0**0.5))  # width, height over the anchor's side


@dataclass(frozen=True)
class Workload:
    """Inputs of one image: everything that a case reads, on the device."""

    features: list[Tensor]
    strides: list[int]
    boxes: Tensor
    weight: list[Tensor]
    bias: list[Tensor]
    offsets: list[list[Tensor]]  # level, aspect: of deform_conv2d
    survivors: dict[int, Tensor]  # percent -> index

    @property
    def flops(self) -> float:
        return 2.0 * self.boxes.shape[0] * self.weight[0][0].numel()


def make_workload(arguments: argparse.Namespace) -> Workload:
    """Random features, and boxes as an ARM leaves them: anchors of four strides, moved and scaled a little."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    strides = [8 * 2**level for level in range(5 if arguments.size >= 1024 else 4)]
    kernel, channels, outputs = arguments.kernel, arguments.channels, arguments.classes + 5
    features, boxes, offsets = [], [], []
    for stride in strides:
        side = arguments.size // stride
        layout = torch.contiguous_format if arguments.planar else torch.channels_last
        features.append(torch.randn(1, channels, side, side, generator=generator).contiguous(memory_format=layout))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        centre = (torch.stack([x, y], dim=-1)[:, :, None] + 0.5) * stride
        size = 4 * stride * torch.tensor(ASPECTS)
        centre = centre + 0.1 * size * torch.randn(side, side, 3, 2, generator=generator)
        size = size * torch.exp(0.2 * torch.randn(side, side, 3, 2, generator=generator))
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        boxes.append(corners.permute(2, 0, 1, 3).flatten(0, 2))  # in the order of row numbers
        offsets.append([_offsets(corners[:, :, aspect], kernel, stride) for aspect in range(3)])
    filters = [torch.randn(3, outputs, channels, kernel, kernel, generator=generator) / 50 for _ in strides]
    bias = [torch.randn(3, outputs, generator=generator) for _ in strides]
    count = sum(part.shape[0] for part in boxes)
    keys = torch.rand(count, generator=generator)
    return Workload(
        features=[feature.to(device, dtype) for feature in features],
        strides=strides,
        boxes=torch.cat(boxes).to(device),
        # Channels innermost, as the detector's head arranges them.
        weight=[part.to(device, dtype).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for part in filters],
        bias=[part.to(device, dtype) for part in bias],
        offsets=[[offset.to(device, dtype) for offset in level] for level in offsets],
        survivors={percent: torch.nonzero(keys < percent / 100).squeeze(1).to(device) for percent in (100, 20, 10, 5)},
    )


def _offsets(corners: Tensor, kernel: int, stride: int) -> Tensor:
    """Offsets that deform_conv2d adds to its regular taps to sample the boxes [H, W, 4]: [1, 2 * K * K, H, W]."""
    height, width, _ = corners.shape
    parts = (torch.arange(kernel) + 0.5) / kernel
    taps = torch.arange(kernel) - kernel // 2
    x = (corners[..., :1] + (corners[..., 2:3] - corners[..., :1]) * parts) / stride - 0.5
    y = (corners[..., 1:2] + (corners[..., 3:] - corners[..., 1:2]) * parts) / stride - 0.5
    x = (x - torch.arange(width)[None, :, None] - taps)[:, :, None, :].expand(-1, -1, kernel, -1)
    y = (y - torch.arange(height)[:, None, None] - taps)[:, :, :, None].expand(-1, -1, -1, kernel)
    return torch.stack([y, x], dim=-1).flatten(2).permute(2, 0, 1)[None].contiguous()


def make_cases(work: Workload) -> dict[str, Callable[[], None]]:
    kernel = work.weight[0].shape[-1]
    padding = kernel // 2
    trained = [tensor.detach().requires_grad_() for tensor in (*work.features, *work.weight, *work.bias)]
    num_levels = len(work.strides)
    features, weight, bias = trained[:num_levels], trained[num_levels : 2 * num_levels], trained[2 * num_levels :]
    joined = [filters.flatten(0, 1).contiguous(memory_format=torch.channels_last) for filters in work.weight]
    with torch.no_grad():
        output = work.features[0].new_empty(work.boxes.shape[0], work.weight[0].shape[1])
    full = torch.randn_like(output)
    mined = full * (torch.rand(output.shape[0], 1, device=output.device) < 0.025)  # 3:1 mining leaves about this many

    def vanilla() -> None:
        with torch.no_grad():
            for feature, filters, offset in zip(work.features, joined, work.bias, strict=True):
                functional.conv2d(feature, filters, offset.flatten(), padding=padding)

    # torchvision has no bf16 kernel.
    kind = torch.float16 if output.dtype == torch.bfloat16 else output.dtype
    places = [[offset.to(kind) for offset in level] for level in work.offsets]
    theirs = [tensor.detach().to(kind).requires_grad_() for tensor in trained]

    def deform() -> list[Tensor]:
        return [
            deform_conv2d(theirs[level], places[level][aspect], theirs[num_levels + level][aspect],
                          theirs[2 * num_levels + level][aspect], padding=padding)
            for level in range(num_levels)
            for aspect in range(3)
        ]  # fmt: skip

    def deform_forward() -> None:
        with torch.no_grad():
            deform()

    def deform_train() -> None:
        outputs = deform()
        torch.autograd.grad(outputs, theirs, [torch.ones_like(output) for output in outputs])

    def sparse(percent: int) -> Callable[[], None]:
        index = work.survivors[percent]
        boxes = work.boxes[index]

        def run() -> None:
            with torch.no_grad():
                align_conv(work.features, work.strides, boxes, index, work.weight, work.bias)

        return run

    def train(gradient: Tensor) -> Callable[[], None]:
        def run() -> None:
            outputs = align_conv(features, work.strides, work.boxes, work.survivors[100], weight, bias)
            torch.autograd.grad(outputs, trained, gradient)

        return run

    return {
        "vanilla convolution": vanilla,
        "AlignConv, all anchors": sparse(100),
        "AlignConv, 20 % survive": sparse(20),
        "AlignConv, 10 % survive": sparse(10),
        "AlignConv, 5 % survive": sparse(5),
        "deform_conv2d": deform_forward,
        "AlignConv, forward + backward": train(full),
        "AlignConv, forward + backward, 2.5 % of rows": train(mined),
        "deform_conv2d, forward + backward": deform_train,
    }


def measure(cases: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition of every case but the first, which warms up; a GPU's by its own events.

    On a CPU deform_conv2d takes many seconds: it needs no warming up, and two repetitions are enough.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            slow = device.type == "cpu" and name.startswith("deform")
            if slow and repeat >= 2:
                continue
            elapsed = _time_on_gpu(case) if device.type == "cuda" else _time_on_cpu(case)
            if repeat > 0 or slow:
                milliseconds[name].append(elapsed)
    return milliseconds


def _time_on_cpu(case: Callable[[], None]) -> float:
    start = time.perf_counter()
    case()
    return 1e3 * (time.perf_counter() - start)


def _time_on_gpu(case: Callable[[], None], calls: int = 10) -> float:
    """Of one call among several, so that the queue is full and the host's clock plays no part."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    case()
    begin.record()
    for _ in range(calls):
        case()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def measure_roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a matrix product, bytes/s of a copy), the best of some, in this very state of the machine."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    buffer = torch.empty(2, 2**27 if device.type == "cuda" else 2**24, device=device)
    best = [float("inf"), float("inf")]
    for _ in range(5):
        for kind, work in enumerate((lambda: left @ right, lambda: buffer[0].copy_(buffer[1]))):
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[kind] = min(best[kind], time.perf_counter() - start)
    return 2.0 * side**3 / best[0], 8.0 * buffer.shape[1] / best[1]


def measure_memory(work: Workload) -> dict[str, float]:
    """MB beyond inputs and results (output, gradients) at the highest point of a call. Linux, or a GPU."""
    results = {}
    for name, percent, train in (
        ("forward, 10 %", 10, False),
        ("forward, all anchors", 100, False),
        ("forward + backward, all anchors", 100, True),
    ):
        index = work.survivors[percent]
        tensors = [part.detach().requires_grad_(train) for part in (*work.features, *work.weight, *work.bias)]
        levels = len(work.strides)
        features, weight, bias = tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]
        boxes = work.boxes[index]
        results_mb = index.numel() * bias[0].shape[1] * bias[0].element_size() / 1e6
        if train:  # and the gradient that comes in
            results_mb = 2 * results_mb + sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6

        def run(rows: slice = slice(None)) -> None:
            output = align_conv(features, work.strides, boxes[rows], index[rows], weight, bias)  # noqa: B023
            if train:  # noqa: B023
                torch.autograd.grad(output, tensors, torch.ones_like(output))  # noqa: B023

        gc.collect()
        if work.boxes.is_cuda:
            run(slice(8))
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            results[name] = (torch.cuda.max_memory_allocated() - before) / 1e6 - results_mb
        else:
            run(slice(8))
            # Memory that was freed but not returned would hide what the call needs.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            run()
            results[name] = (_status("VmHWM") - before) * 1.024e-3 - results_mb
    return results


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", type=int, default=1024, help="side of the input, pixels")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--kernel", type=int, default=3, choices=[3, 5, 7])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--planar", action="store_true", help="features in [B, F, H, W] memory, not channels-last")
    parser.add_argument("--skip", nargs="*", default=[], help="skip the cases whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command; times mean nothing")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.channels, arguments.repeats = 64, 16, 1
    device = torch.device(arguments.device)
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    work = make_workload(arguments)
    memory = measure_memory(work)
    cases = {n: case for n, case in make_cases(work).items() if not any(part in n for part in arguments.skip)}
    milliseconds = measure(cases, device, arguments.repeats)
    flops, bandwidth = measure_roofline(device, getattr(torch, arguments.dtype))
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    floors = {f"AlignConv, {p} %": 1e3 * work.flops * p / 100 / flops for p in (100, 20, 10, 5)}

    where = describe_where(["torchvision"], device.type)
    where["versions"]["operators"] = (
        " and ".join(library.describe_library().compilers) or library.describe_library().reason
    )
    workload = (
        f"{arguments.size} pixels, {work.boxes.shape[0]:,} anchors, {arguments.channels} channels, "
        f"{arguments.kernel}x{arguments.kernel}, {arguments.classes + 5} outputs, {arguments.dtype}, "
        f"{'planar' if arguments.planar else 'channels-last'}, {work.flops / 1e9:.1f} GFLOP."
    )
    lines = [f"{key:13} {value}" for key, value in {**where, "workload": workload}.items()]
    lines.append(f"\n{'case':46} {'median ms':>10} {'min':>9} {'max':>9} {'of vanilla':>11} {'deform / this':>14}")
    rows = []
    for name, times in milliseconds.items():
        deform = "deform_conv2d, forward + backward" if "backward" in name else "deform_conv2d"
        ratios = _ratio(medians, name, "vanilla convolution"), _ratio(medians, deform, name)
        rows.append([name, f"{medians[name]:.4g}", f"{min(times):.4g} - {max(times):.4g}", *ratios])
        lines.append(
            f"{name:46} {medians[name]:10.2f} {min(times):9.2f} {max(times):9.2f} {ratios[0]:>11} {ratios[1]:>14}"
        )
    lines.append(
        f"\nroofline: {flops / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.1f} GB/s (copy); floor ms "
        + ", ".join(f"{name}: {value:.2f}" for name, value in floors.items())
    )
    lines.append(
        "peak memory beyond inputs and results: " + ", ".join(f"{name}: {mb:.0f} MB" for name, mb in memory.items())
    )
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json:
        figures = {
            "milliseconds": milliseconds,
            "memory_mb": memory,
            "roofline": {"flops_per_s": flops, "bytes_per_s": bandwidth, "floor_ms": floors},
            "library": {key: str(value) for key, value in asdict(library.describe_library()).items() if key != "path"},
        }
        columns = ["case", "median ms", "min - max", "of the vanilla convolution", "times faster than `deform_conv2d`"]
        spread = f"least and most of {arguments.repeats} repetitions"
        save_result(arguments.json, columns, rows, where, workload=workload, spread=spread, figures=figures)


def _ratio(medians: dict[str, float], above: str, below: str) -> str:
    return f"{medians[above] / medians[below]:.3f}" if above in medians and below in medians else ""


if __name__ == "__main__":
    main()
