"""Everything that only a GPU can show, in one command, printed as it goes: `python -m tests.gpu.check`.

Needs torch 2.11 or newer, a built library and pytest; no Ray and no network. Ends with status 1 where a GPU is and a
step fails, and with status 3 where no GPU is.
"""

from __future__ import annotations

import argparse
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

from tests.bench.bench_align_conv import Workload, make_workload

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of all steps together")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        show("GPU", "none: nothing was checked")
        return 3
    end = time.monotonic() + 60 * arguments.minutes
    show("GPU", f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    show("operators", library.describe().reason)
    if fault := library.describe_fault_on_gpu(torch.cuda.current_device()):
        show("FAILED", fault)
        return 1
    failed = run("parity, graphs, determinism", ["-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-x"], end)
    for channels in (256, 1024):
        for dtype in ("bfloat16", "float32"):
            failed += check_kernels(channels, dtype)
    failed += run("operator bench", ["-m", "tests.bench.bench_align_conv", "--dtype", "bfloat16"], end)
    failed += run("operator bench, 1024", ["-m", "tests.bench.bench_align_conv", "--channels", "1024"], end)
    failed += run("detector bench", ["-m", "tests.bench.bench_detector", "--sizes", "320", "512"], end)
    show("result", f"{failed} steps failed" if failed else "all steps passed")
    return int(failed > 0)


def show(name: str, text: str) -> None:
    sys.stdout.write(f"{name:44} {text}\n")
    sys.stdout.flush()


def run(name: str, command: list[str], end: float) -> int:
    left = end - time.monotonic()
    if left < 5:
        show(name, "FAILED: no time left")
        return 1
    try:
        status = subprocess.run([sys.executable, *command], cwd=REPOSITORY, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        show(name, f"FAILED: not finished after {left:.0f} s")
        return 1
    show(name, "passed" if status == 0 else f"FAILED: status {status}")
    return int(status != 0)


def check_kernels(channels: int, dtype: str) -> int:
    """Parity with fp64, and microseconds alone and in a CUDA graph, of the forward at the real size."""
    work = make_workload(
        argparse.Namespace(device="cuda", dtype=dtype, size=1024, channels=channels, classes=80, kernel=3, planar=False)
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
        show(name, f"error {error:.1e}{verdict}, {microseconds(forward):.1f} us, graph {in_graph(forward):.1f} us")
    return failed


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
