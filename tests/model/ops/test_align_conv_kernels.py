"""The GPU kernels of AlignConv without a GPU: their bodies on the host, and what the compiler made of them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from refinedet.model.ops import align_conv_products, library
from refinedet.model.ops.align_conv import align_conv
from refinedet.model.ops.align_conv_reference import align_conv_reference
from torch import Tensor

from tests.model.ops.align_conv_cases import Case, make_case, outputs_and_gradients, relative_error
from tests.outside import REPOSITORY

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# fp32 rounds the samples' places on the GPU; 16-bit columns are rounded before the product.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Problem(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int) for name in ("num_levels", "aspects", "kernel", "channels", "outputs")],
        *[(name, ctypes.c_int64) for name in ("batch", "rows")],
        *[(name, ctypes.c_void_p) for name in ("heights", "widths", "strides", "cells", "boxes", "rows_in_order")],
    ]


class Bodies:
    """The kernels' bodies as functions of tensors on the CPU, with the schemas of the operators."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))

    def problem(self, features, strides, boxes, index, aspects: int, kernel: int, outputs: int = 1) -> Problem:
        cells = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
        self.kept = [cells, boxes.float().contiguous(), index.contiguous()]
        numbers = [
            (ctypes.c_int * len(cells))(*values)
            for values in ([c.shape[1] for c in cells], [c.shape[2] for c in cells], strides)
        ]
        pointers = _pointers(cells)
        self.kept += [numbers, pointers]
        sizes = (len(cells), aspects, kernel, features[0].shape[1], outputs, features[0].shape[0], len(index))
        places = [ctypes.cast(part, ctypes.c_void_p) for part in (*numbers, pointers)]
        return Problem(*sizes, *places, self.kept[1].data_ptr(), self.kept[2].data_ptr())

    def fused(self, case: Case) -> Tensor:
        aspects, outputs, _, kernel, _ = case.weight[0].shape
        output = torch.zeros(len(case.index), outputs, dtype=case.features[0].dtype)
        problem = self.problem(*case.arguments()[:4], aspects, kernel, outputs)
        weight = [filters.permute(0, 1, 3, 4, 2).contiguous() for filters in case.weight]
        bias = [offset.contiguous() for offset in case.bias]
        dtype = DTYPES.index(output.dtype)
        self.functions.run_fused(ctypes.byref(problem), dtype, _pointers(weight), _pointers(bias), _pointer(output))
        return output

    def align_conv_columns(self, features, strides, boxes, index, aspects, kernel) -> Tensor:
        columns = features[0].new_empty(len(index), kernel * kernel * features[0].shape[1])
        problem = self.problem(features, strides, boxes, index, aspects, kernel)
        self.functions.run_columns(ctypes.byref(problem), DTYPES.index(columns.dtype), _pointer(columns))
        return columns

    def align_conv_scatter(self, grad, columns, features, strides, boxes, index, aspects, kernel) -> None:
        problem = self.problem(features, strides, boxes, index, aspects, kernel)
        self.functions.run_scatter(
            ctypes.byref(problem), DTYPES.index(columns.dtype), _pointer(columns), _pointer(grad)
        )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Bodies:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc to compile the kernels' bodies")
    path = tmp_path_factory.mktemp("bodies") / "bodies.so"
    source = Path(__file__).with_name("kernel_bodies.cu")
    flags = ["-std=c++20", "-O3", "-shared", "-Xcompiler", "-fPIC", "-arch=sm_80", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(path)], check=True)
    return Bodies(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 24, "outputs": 85, "sizes": ((6, 8), (3, 4)), "aspects": 2},
        {"channels": 72, "outputs": 100, "sizes": ((3, 5),), "batch": 1},  # two tiles of outputs, two stages a tap
        {"channels": 8, "outputs": 6, "kernel": 5, "sizes": ((3, 3),), "aspects": 1},
        {"channels": 8, "outputs": 6, "kernel": 7, "sizes": ((3, 3),), "aspects": 1},
    ],
    ids=str,
)
def test_fused_body_equals_the_cpu_kernel(bodies: Bodies, dtype: torch.dtype, options: dict) -> None:
    case = make_case(dtype=dtype, **options)
    total = len(case.index)
    case = case.rows(torch.arange(total) % 7 != 0)  # some rows of each group, then empty ones
    case = replace(case, index=torch.where(case.index < total - 5, case.index, total))
    case.boxes[11] = float("nan")
    got, want = bodies.fused(case), align_conv(*case.arguments())
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert relative_error(got, align_conv_reference(*case.to(torch.float64).arguments())) < TOLERANCE[dtype]
    assert (got[case.index == total] == 0).all()


def test_rows_out_of_order_are_marked_not_computed(bodies: Bodies) -> None:
    case = make_case(channels=8, sizes=((6, 8), (3, 4)))
    wrong = case.index.clone()
    wrong[[3, 300]] = wrong[[300, 3]]
    wrong[0] = -4
    output = bodies.fused(replace(case, index=wrong))
    assert output[[0, 3, 300]].isnan().all()
    right = torch.ones(len(wrong), dtype=torch.bool)
    right[[0, 3, 300]] = False
    assert relative_error(output[right], align_conv(*case.arguments())[right]) < 1e-5


@pytest.fixture
def backward_on_the_host(bodies: Bodies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_conv_products, "operators", lambda: bodies)
    monkeypatch.setitem(align_conv_products.ROWS_PER_CHUNK, "cpu", 50)  # chunks that begin and end inside a group


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.usefixtures("backward_on_the_host")
def test_backward_with_the_bodies_equals_the_cpu_kernel(dtype: torch.dtype, kernel: int) -> None:
    case = make_case(kernel=kernel, channels=16, sizes=((8, 9), (4, 5)), dtype=dtype)
    case = replace(case, index=torch.where(case.index < len(case.index) - 9, case.index, len(case.index)))
    gradient = torch.randn(len(case.index), 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradient[::3] = 0
    want = outputs_and_gradients(align_conv_reference, case.to(torch.float64), gradient.double())[1:]
    got = align_conv_products.align_conv_backward(gradient, *case.arguments()[:-1], True, True, False)
    for part, wanted in zip(got, want, strict=True):
        assert part.shape == wanted.shape
        assert relative_error(part, wanted) < TOLERANCE[dtype]
    only_filters = align_conv_products.align_conv_backward(gradient, *case.arguments()[:-1], False, True, False)
    assert all(torch.equal(a, b) for a, b in zip(only_filters, got[2:], strict=True))


def _check_resources(report: str, pattern: str) -> dict[str, tuple[int, ...]]:
    """Kernel -> the numbers of the pattern, in ptxas's or cuobjdump's report; AlignConv's kernels must all be there."""
    found = {}
    functions = re.findall(r"Function (?:properties for )?(\w+):?\s(.*?)(?=Function |\Z)", report, re.DOTALL)
    for name, rest in functions:
        numbers = re.search(pattern, rest)
        if numbers:
            found[name] = tuple(int(number) for number in numbers.groups())
    for kernel in ("fused_kernel", "gather_kernel", "scatter_kernel", "suppress_kernel"):
        assert any(kernel in name for name in found), f"{kernel} is not in the report"
    return found


@pytest.mark.skipif(not library.describe_library().architectures, reason="the library is built without CUDA")
def test_built_kernels_use_no_stack() -> None:
    """Spills live on the stack, so no stack means no spills."""
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    tool = shutil.which("cuobjdump") or bundled
    if tool is None or not Path(tool).exists():
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    command = [str(tool), "--dump-resource-usage", str(library.describe_library().path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kernel, (registers, stack, local) in _check_resources(report, r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)").items():
        assert stack == local == 0, f"{kernel} uses {stack} bytes of stack, {local} of local memory"
        assert registers <= 128, f"{kernel} uses {registers} registers; two blocks of 256 threads need at most 128"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_spills(architecture: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    include = Path(torch.__file__).parent / "include"
    reports = []
    for source in sorted((REPOSITORY / "csrc/cuda").glob("*.cu")):
        command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", str(source)]
        command += ["--diag-error=20011", f"-I{REPOSITORY / 'csrc'}", "-isystem", str(include), "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-o", str(tmp_path / "kernels.cubin")]
        reports.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    for kernel, numbers in _check_resources("\n".join(reports), pattern).items():
        assert numbers == (0, 0, 0), f"{kernel}: stack, spill stores and spill loads are {numbers} bytes"
