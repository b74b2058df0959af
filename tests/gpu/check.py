"""Everything that only a GPU can show, in one command, printed as it goes: `python -m tests.gpu.check`.

Needs torch 2.11 or newer, a built library and pytest; no Ray and no network. Ends with status 1 where a GPU is and a
step fails, and with status 2 where no GPU is. `--rehearse` takes the same steps on a CPU at small sizes, to try this
command itself; its times mean nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from refinedet.model.ops import library
from refinedet.model.ops.align_conv import align_conv
from refinedet.model.ops.align_conv_reference import align_conv_reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.bench.bench_align_conv import Workload, make_workload
from tests.bench.bench_detector import make_detector

REPOSITORY = Path(__file__).resolve().parents[2]
OPERATOR_BENCH, DETECTOR_BENCH = "tests.bench.bench_align_conv", "tests.bench.bench_detector"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of all steps together")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.rehearse):
        show("GPU", "no CUDA device was found, so nothing was checked; run this on a machine with one")
        return 2
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    if device.type == "cuda":
        show("GPU", f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    show("operators", library.describe_library().reason)
    if device.type == "cuda" and (fault := library.describe_fault_on_gpu(torch.cuda.current_device())):
        show("FAILED", fault)
        return 1
    # Without the options of pyproject.toml, which need plugins.
    failed = 0
    if device.type == "cuda":
        tests = ["-m", "pytest", "tests/gpu", "-o", "addopts=", "-q", "-x", "-rs"]
        failed += run("parity, graphs, determinism", tests, end)
    for channels in (256, 1024):
        for dtype in ("bfloat16", "float32"):
            failed += attempt(f"AlignConv {channels} channels, {dtype}", check_kernels, device, channels, dtype)
    small = ["--device", device.type, *(["--quick"] if arguments.rehearse else [])]
    for name, options in (
        ("operator bench", ["--dtype", "bfloat16"]),
        ("operator bench, 1024 channels", ["--channels", "1024"]),
        ("operator bench, fp32", ["--dtype", "float32"]),
    ):
        failed += run(name, ["-m", OPERATOR_BENCH, *options, *small], end)
    failed += run("detector bench", ["-m", DETECTOR_BENCH, "--sizes", "320", "512", *small], end)
    failed += attempt("profile of a detection", profile_detection, device)
    if shutil.which("ncu") and device.type == "cuda":  # counters may be closed to users: no fault of the kernels
        kernels = ["--set", "full", "--clock-control", "none", "-k", "regex:fused", "-c", "2"]
        bench = [sys.executable, "-m", OPERATOR_BENCH, "--repeats", "1", "--skip", "deform", "backward"]
        run("Nsight Compute (optional)", [*kernels, *bench], end, program="ncu")
    else:
        show("Nsight Compute (optional)", "not installed")
    show("result", f"{failed} steps failed" if failed else "all steps passed")
    return int(failed > 0)


def show(name: str, text: str) -> None:
    sys.stdout.write(f"{name:44} {text}\n")
    sys.stdout.flush()


def attempt(name: str, step: Callable[..., int], *arguments: object) -> int:
    """Failures of a step; one that raises is a failure, and the next steps follow."""
    try:
        return step(*arguments)
    except Exception as error:
        show(name, f"FAILED: {type(error).__name__}: {error}")
        return 1


def run(name: str, command: list[str], end: float, program: str = sys.executable) -> int:
    left = end - time.monotonic()
    if left < 5:
        show(name, "FAILED: no time left")
        return 1
    try:
        status = subprocess.run([program, *command], cwd=REPOSITORY, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        show(name, f"FAILED: not finished after {left:.0f} s")
        return 1
    show(name, "passed" if status == 0 else f"FAILED: status {status}")
    return int(status != 0)


def check_kernels(device: torch.device, channels: int, dtype: str) -> int:
    """Parity with fp64, and microseconds alone and in a CUDA graph, of the forward at the real size."""
    size = 1024 if device.type == "cuda" else 64
    work = make_workload(
        argparse.Namespace(
            device=device.type, dtype=dtype, size=size, channels=channels, classes=80, kernel=3, planar=False
        )
    )
    failed = 0
    for percent in (100, 10):
        rows = work.survivors[percent]
        boxes = work.boxes[rows]

        def forward(rows: Tensor = rows, boxes: Tensor = boxes) -> Tensor:
            with torch.no_grad():
                return align_conv(work.features, work.strides, boxes, rows, work.weight, work.bias)

        error = relative_error(work, forward(), rows, boxes)
        right = error < (1e-5 if dtype == "float32" else 1e-2)
        failed += not right
        verdict = "" if right else " FAILED"
        name = f"AlignConv {channels} channels, {dtype}, {percent} %"
        times = f"{microseconds(forward):.1f} us, graph {in_graph(forward):.1f} us" if device.type == "cuda" else ""
        show(name, f"error {error:.1e}{verdict} {times}")
    return failed


def profile_detection(device: torch.device) -> int:
    """Operators of one detection by their time on the device, and how often the host waited."""
    size, batch = (512, 8) if device.type == "cuda" else (64, 1)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    detector = make_detector("vgg16_reduced", "align", images, 10)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        detector.detect(images)
        with profile(activities=kinds) as seen:
            detector.detect(images)
    events = seen.key_averages()
    waits = sum(event.count for event in events if "Synchronize" in event.key)
    show("profile of a detection", f"{size} pixels, batch {batch}: the host waited {waits} times")
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    sys.stdout.write(events.table(sort_by=order, row_limit=15, max_name_column_width=60) + "\n")
    return 0


def relative_error(work: Workload, output: Tensor, rows: Tensor, boxes: Tensor) -> float:
    some = torch.arange(0, len(rows), max(1, len(rows) // 2000), device=rows.device)
    exact = [[part.double() for part in parts] for parts in (work.features, work.weight, work.bias)]
    want = align_conv_reference(exact[0], work.strides, boxes[some].double(), rows[some], exact[1], exact[2])
    return float((output[some].double() - want).norm() / want.norm())


def microseconds(call: Callable[[], object], calls: int = 50) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(5):
        call()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


def in_graph(call: Callable[[], object]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return microseconds(graph.replay)


if __name__ == "__main__":
    sys.exit(main())
