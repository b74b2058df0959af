"""AlignConv on a GPU: equal to the CPU, deterministic when asked, without a host that waits, clean of memory errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from refinedet.model.ops import library
from refinedet.model.ops.align_conv import align_conv, top_rows
from refinedet.model.ops.align_conv_reference import align_conv_reference

from tests.model.ops.align_conv_cases import Case, make_case, outputs_and_gradients, relative_error
from tests.outside import REPOSITORY

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _on(case: Case, device: torch.device) -> Case:
    return replace(case.to(device), boxes=case.boxes.to(device), index=case.index.to(device))


def test_the_library_holds_cuda_kernels() -> None:
    assert library.describe_library().cuda, library.describe_library().reason


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
    case = replace(case, index=torch.where(case.index < len(case.index) - 3, case.index, len(case.index)))
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
    total = len(case.index)
    beyond = replace(case, index=torch.where(case.index < total - 20, case.index, total + 10**12))
    on_gpu = _on(beyond, gpu)
    output, *gradients = outputs_and_gradients(align_conv, on_gpu, torch.ones(total, 7, device=gpu))
    assert relative_error(output.cpu(), align_conv_reference(*beyond.arguments())) < 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_rows_out_of_order_are_marked(gpu: torch.device) -> None:
    case = _on(make_case(channels=32), gpu)
    wrong = case.index.clone()
    wrong[[3, 300]] = wrong[[300, 3]]
    output = align_conv(*replace(case, index=wrong).arguments())
    assert output[[3, 300]].isnan().all()


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
    total = len(case.index)
    scores = torch.rand(total, device=gpu)

    def run() -> torch.Tensor:
        rows = top_rows(scores, 256, threshold=0.8)
        boxes = case.boxes[rows.clamp(max=total - 1)]
        return align_conv(case.features, case.strides, boxes, rows, case.weight, case.bias)

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
