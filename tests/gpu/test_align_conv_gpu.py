"""AlignConv on a GPU: equal to the CPU, deterministic when asked, without a host that waits, clean of memory errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refinedet.model.ops import library
from refinedet.model.ops.align_conv import align_conv, top_anchors
from refinedet.model.ops.align_conv_reference import align_conv_reference

from tests.conftest import REPOSITORY
from tests.model.ops.align_conv_cases import Case, make_case, outputs_and_gradients, relative_error

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _on(case: Case, device: torch.device) -> Case:
    return replace(case.to(device), boxes=case.boxes.to(device), index=case.index.to(device))


def test_the_library_holds_cuda_kernels() -> None:
    assert library.describe().cuda, library.describe().reason


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 256, "outputs": 85, "sizes": ((40, 40), (20, 20), (10, 10), (5, 5))},
        {"channels": 24, "outputs": 7, "kernel": 5, "sizes": ((33, 17), (9, 5))},
        {"channels": 19, "outputs": 100, "kernel": 7, "sizes": ((8, 8),)},  # padded channels, two tiles of outputs
        {"channels": 8, "outputs": 1, "sizes": ((1, 1),), "batch": 1, "aspects": 1},
    ],
    ids=str,
)
def test_equals_the_reference(gpu: torch.device, dtype: torch.dtype, options: dict, seed: int) -> None:
    case = make_case(dtype=dtype, seed=seed, **options)
    case = replace(case, index=torch.where(case.index % 7 == 3, -1, case.index))
    gradient = torch.randn(len(case.index), options["outputs"]).to(dtype)
    gradient[::3] = 0
    want = outputs_and_gradients(align_conv_reference, case.to(torch.float64), gradient.double())
    got = outputs_and_gradients(align_conv, _on(case, gpu), gradient.to(gpu))
    for part, wanted in zip(got, want, strict=True):
        assert part.dtype == dtype
        assert relative_error(part.cpu(), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 1e30])
def test_hostile_boxes_and_indices(gpu: torch.device, value: float) -> None:
    case = make_case(channels=32)
    case.boxes[::2] = value
    beyond = replace(case, index=torch.where(case.index % 5 == 0, case.index + 10**12, case.index))
    on_gpu = _on(beyond, gpu)
    output, *gradients = outputs_and_gradients(align_conv, on_gpu, torch.ones(len(case.index), 7, device=gpu))
    want = align_conv_reference(*replace(case, index=torch.where(case.index % 5 == 0, -1, case.index)).arguments())
    assert relative_error(output.cpu(), want) < 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_no_rows(gpu: torch.device) -> None:
    case = _on(make_case(channels=32), gpu)
    output, *gradients = outputs_and_gradients(
        align_conv, case.rows(torch.arange(0, device=gpu)), torch.ones(0, 7, device=gpu)
    )
    assert output.shape == (0, 7)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode(gpu: torch.device, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    case = _on(make_case(channels=64, outputs=85, sizes=((40, 40), (20, 20))), gpu)
    gradient = torch.randn(len(case.index), 85, device=gpu)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first = outputs_and_gradients(align_conv, case, gradient)
        for _ in range(20 if deterministic else 3):
            again = outputs_and_gradients(align_conv, case, gradient)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b) if deterministic else relative_error(b, a) < 1e-5
    finally:
        torch.use_deterministic_algorithms(False)


def test_captured_in_a_cuda_graph(gpu: torch.device) -> None:
    case = _on(make_case(channels=64, sizes=((20, 20), (10, 10)), dtype=torch.bfloat16), gpu)
    scores = torch.rand(2, len(case.index) // 2, device=gpu)

    def run() -> torch.Tensor:
        index = top_anchors(scores, 256, threshold=0.8)
        return align_conv(case.features, case.strides, case.boxes[index.clamp_min(0)], index, case.weight, case.bias)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        output = run()
    for seed in range(3):
        scores.copy_(torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(output, run())


def test_host_never_waits_in_the_forward(gpu: torch.device) -> None:
    case = _on(make_case(channels=64, dtype=torch.bfloat16), gpu)
    align_conv(*case.arguments())
    torch.cuda.set_sync_debug_mode("error")
    try:
        align_conv(*case.arguments())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled(gpu: torch.device) -> None:
    case = _on(make_case(channels=64), gpu)
    compiled = torch.compile(align_conv, fullgraph=True)
    torch.testing.assert_close(compiled(*case.arguments()), align_conv(*case.arguments()))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    code = (
        "import torch; from dataclasses import replace; from tests.gpu.test_align_conv_gpu import *\n"
        "for dtype in TOLERANCE:\n"
        "    case = _on(make_case(channels=72, outputs=100, sizes=((9, 7),), dtype=dtype), torch.device('cuda'))\n"
        "    for deterministic in (False, True):\n"
        "        torch.use_deterministic_algorithms(deterministic, warn_only=True)\n"
        "        outputs_and_gradients(align_conv, case, torch.ones(len(case.index), 100, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    command = [sanitizer, "--tool", tool, "--kernel-regex", "kns=refinedet", "--error-exitcode", "9"]
    done = subprocess.run([*command, sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_timings(tmp_path: Path) -> None:
    """The bounds are those of an H200; other GPUs only have to finish."""
    report = tmp_path / "align_conv.json"
    bench = REPOSITORY / "tests/bench/bench_align_conv.py"
    subprocess.run([sys.executable, str(bench), "--json", str(report), "--repeats", "20"], cwd=REPOSITORY, check=True)
    times = {name: sorted(values)[len(values) // 2] for name, values in
             json.loads(report.read_text())["milliseconds"].items()}  # fmt: skip
    if "H200" not in torch.cuda.get_device_name():
        pytest.skip(f"no bounds are known for this GPU: {times}")
    assert times["AlignConv, 10 % survive"] <= 0.060
    assert times["AlignConv, all anchors"] <= times["deform_conv2d"] / 4
    assert times["AlignConv, all anchors"] <= 2 * times["vanilla convolution"]
    assert times["detector at 320, align"] <= times["detector at 320, vanilla"]
