"""AlignConv against its definition, torchvision and its own reference, and against what may be thrown at it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refinedet.model.ops import align_conv_products, library
from refinedet.model.ops.align_conv import align_conv
from refinedet.model.ops.align_conv_products import find_corners
from refinedet.model.ops.align_conv_reference import align_conv_reference, split_rows
from torch import Tensor
from torchvision.ops import deform_conv2d

from tests.model.ops.align_conv_cases import (
    align_conv_by_loops,
    make_case,
    needs_library,
    outputs_and_gradients,
    relative_error,
)

IMPLEMENTATIONS = {"library": align_conv, "reference": align_conv_reference}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest):
    if request.param == "library" and not library.describe_library().loaded:
        pytest.skip(library.describe_library().reason)
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_equals_its_definition(implementation, kernel: int) -> None:
    case = make_case(kernel=kernel, dtype=torch.float64)
    assert relative_error(implementation(*case.arguments()), align_conv_by_loops(case)) < 1e-13


def test_equals_deform_conv2d(implementation) -> None:
    case = make_case(dtype=torch.float64)
    batch, kernel, start = 2, 3, 0
    output = implementation(*case.arguments())
    for level, feature in enumerate(case.features):
        height, width = feature.shape[-2:]
        here = slice(start, start + batch * height * width * 3)
        start = here.stop
        places = case.boxes[here].double().view(3, batch, height, width, 4)
        for aspect in range(3):
            parts = (torch.arange(kernel, dtype=torch.float64) + 0.5) / kernel
            x1, y1, x2, y2 = places[aspect].unsqueeze(-1).unbind(dim=-2)
            taps = torch.arange(kernel) - kernel // 2
            x = (x1 + (x2 - x1) * parts) / case.strides[level] - 0.5 - torch.arange(width)[:, None] - taps
            y = (y1 + (y2 - y1) * parts) / case.strides[level] - 0.5 - torch.arange(height)[:, None, None] - taps
            offset = torch.stack(torch.broadcast_tensors(y[..., :, None], x[..., None, :]), dim=-1)
            want = deform_conv2d(
                feature,
                offset.flatten(3).permute(0, 3, 1, 2),
                case.weight[level][aspect],
                case.bias[level][aspect],
                padding=kernel // 2,
            )
            got = output[here].view(3, batch, height, width, 7)[aspect]
            torch.testing.assert_close(got.permute(0, 3, 1, 2), want, rtol=0, atol=1e-12)


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 1, "outputs": 1, "aspects": 1},
        {"channels": 257, "outputs": 85, "sizes": ((8, 8),)},  # a block of channels and one more
        {"channels": 19, "outputs": 25, "kernel": 5},
        {"channels": 16, "outputs": 130, "batch": 1, "kernel": 7},
    ],
    ids=str,
)
def test_library_equals_reference_in_fp64(dtype: torch.dtype, options: dict) -> None:
    case = make_case(dtype=dtype, **options)
    gradient = torch.randn(len(case.index), options["outputs"], generator=torch.Generator().manual_seed(1)).to(dtype)
    gradient[::3] = 0
    got = outputs_and_gradients(align_conv, case, gradient)
    want = outputs_and_gradients(align_conv_reference, case.to(torch.float64), gradient.double())
    for part, wanted in zip(got, want, strict=True):
        assert part.dtype == dtype
        assert relative_error(part, wanted) < TOLERANCE[dtype]


@needs_library
def test_gradcheck() -> None:
    case = make_case(sizes=((3, 4), (2, 2)), batch=1, channels=2, outputs=2, aspects=2, dtype=torch.float64)
    case = replace(case, boxes=case.boxes.double())
    leaves = [tensor.requires_grad_() for tensor in case.parameters()]

    def run(*tensors: Tensor) -> Tensor:
        return align_conv(tensors[:2], case.strides, case.boxes, case.index, tensors[2:4], tensors[4:])

    torch.autograd.gradcheck(run, leaves)


def test_gradcheck_of_the_reference_reaches_the_boxes() -> None:
    case = make_case(sizes=((4, 4),), batch=1, channels=2, outputs=2, aspects=1, dtype=torch.float64)
    boxes = case.boxes.double().requires_grad_()

    def run(places: Tensor) -> Tensor:
        arguments = (case.features, case.strides, places, case.index, case.weight, case.bias)
        return align_conv_reference(*arguments, box_gradient=True)

    torch.autograd.gradcheck(run, boxes)


@needs_library
def test_opcheck() -> None:
    case = make_case(sizes=((3, 4), (2, 2)), channels=4, dtype=torch.float32)
    align_conv(*case.arguments())  # registers shapes and gradients
    gradient = torch.randn(len(case.index), 7)
    for asked in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.refinedet.align_conv_backward.default,
            (gradient, *case.arguments()[:-1], *asked, False),
            test_utils=("test_schema", "test_faketensor"),
        )
    for tensor in case.parameters():
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.refinedet.align_conv.default, case.arguments())


def test_no_gradient_reaches_the_boxes(implementation) -> None:
    case = make_case()
    boxes = case.boxes.requires_grad_()
    weight = [filters.requires_grad_() for filters in case.weight]
    output = implementation(case.features, case.strides, boxes, case.index, weight, case.bias)
    output.sum().backward()
    assert boxes.grad is None
    assert weight[0].grad is not None


def test_groups_without_rows_give_zero_gradients(implementation) -> None:
    case = make_case().rows(torch.tensor([0, 3]))
    gradients = outputs_and_gradients(implementation, case, torch.ones(2, 7))[1:]
    assert all(gradient is not None for gradient in gradients)
    assert gradients[3][0].abs().sum() > 0
    assert gradients[4].abs().sum() == 0


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(implementation, rows: int) -> None:
    case = make_case(dtype=torch.float64).rows(torch.arange(rows) + 40)
    output, *gradients = outputs_and_gradients(implementation, case, torch.ones(rows, 7))
    torch.testing.assert_close(output, align_conv_by_loops(case))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_some_rows_equal_the_same_rows_of_all(implementation) -> None:
    case = make_case(dtype=torch.float64)
    chosen = torch.arange(1, len(case.index), 5)
    torch.testing.assert_close(
        implementation(*case.rows(chosen).arguments()), implementation(*case.arguments())[chosen], rtol=0, atol=1e-13
    )


def test_batched_equals_single(implementation) -> None:
    case = make_case(dtype=torch.float64)
    image = split_rows(case.index, case.features, 3)[2]
    together = implementation(*case.arguments())
    for number in range(2):
        own = image == number
        alone = replace(
            case.rows(own),
            features=[feature[number : number + 1] for feature in case.features],
            index=torch.arange(int(own.sum())),
        )
        torch.testing.assert_close(implementation(*alone.arguments()), together[own])


@needs_library
def test_rows_out_of_order_are_refused() -> None:
    case = make_case(dtype=torch.float64)
    for wrong in (case.index.flip(0), case.index - 1):
        with pytest.raises(ValueError, match="rows must be ascending numbers from 0 on"):
            align_conv(*replace(case, index=wrong).arguments())


def test_empty_rows_are_zero_and_have_no_gradient(implementation) -> None:
    case = make_case(dtype=torch.float64)
    total = len(case.index)
    padded = replace(case, index=torch.where(case.index < total - 50, case.index, total))
    used = padded.index < total
    gradient = torch.randn(total, 7, dtype=torch.float64)
    got = outputs_and_gradients(implementation, padded, gradient)
    want = outputs_and_gradients(implementation, padded.rows(used), gradient[used])
    assert (got[0][~used] == 0).all()
    torch.testing.assert_close(got[0][used], want[0])
    for part, wanted in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(part, wanted)


@needs_library
def test_second_derivatives_are_refused_with_a_sentence() -> None:
    case = make_case(sizes=((3, 4),), channels=4)
    leaves = [tensor.requires_grad_() for tensor in case.parameters()]
    gradients = torch.autograd.grad(align_conv(*case.arguments()).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="align_conv has no second derivative"):
        sum(gradient.sum() for gradient in gradients).backward()


@pytest.mark.parametrize(
    "box",
    [
        [float("nan")] * 4,
        [0.0, float("nan"), 20.0, 20.0],
        [float("-inf"), 0.0, float("inf"), 20.0],
        [1e30, 1e30, 2e30, 2e30],
        [-1e30, 5.0, 1e30, 30.0],
        [-9000.0, -9000.0, -8000.0, -8000.0],
        [10.0, 10.0, 10.0, 10.0],
        [40.0, 40.0, 8.0, 8.0],  # turned inside out
        [-8.0, -8.0, 72.0, 56.0],
    ],
    ids=str,
)
def test_hostile_boxes(implementation, box: list[float]) -> None:
    case = make_case(sizes=((6, 8),), batch=1, dtype=torch.float64)
    case = replace(case, boxes=torch.tensor(box).expand(len(case.index), 4))
    output, *gradients = outputs_and_gradients(implementation, case, torch.ones(len(case.index), 7))
    torch.testing.assert_close(output, align_conv_by_loops(case))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@needs_library
def test_infinity_elsewhere_does_not_spread() -> None:
    case = make_case(sizes=((6, 8),), batch=1)
    case.features[0][..., 0, 0] = float("inf")
    away = torch.tensor([[40.0, 24.0, 60.0, 40.0], [-900.0, -900.0, -800.0, -800.0]])
    output = align_conv(*replace(case.rows(torch.tensor([5, 9])), boxes=away).arguments())
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("layout", ["channels-last", "slice", "expanded", "transposed", "cropped channels-last"])
def test_any_layout(implementation, layout: str) -> None:
    case = make_case(channels=12, dtype=torch.float64)
    arrange = {
        "channels-last": lambda feature: feature.contiguous(memory_format=torch.channels_last),
        "slice": lambda feature: torch.cat([feature, feature], dim=1)[:, 6:18],
        "expanded": lambda feature: feature[:1].expand(2, -1, -1, -1),
        "transposed": lambda feature: feature.transpose(2, 3).contiguous().transpose(2, 3),
        "cropped channels-last": lambda feature: torch.nn.functional.pad(
            feature.contiguous(memory_format=torch.channels_last), (1, 2, 3, 4)
        )[:, :, 3:-4, 1:-2],
    }[layout]
    arranged = replace(case, features=[arrange(feature) for feature in case.features])
    plain = replace(arranged, features=[feature.contiguous() for feature in arranged.features])
    strided = replace(
        arranged,
        weight=[filters.transpose(0, 1).contiguous().transpose(0, 1) for filters in case.weight],
        boxes=torch.cat([case.boxes, case.boxes], dim=1)[:, 4:],
        index=torch.stack([case.index, case.index], dim=1)[:, 0],
    )
    gradient = torch.randn(7, len(case.index), dtype=torch.float64).T
    for got, want in zip(
        outputs_and_gradients(implementation, strided, gradient),
        outputs_and_gradients(align_conv_reference, plain, gradient),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@needs_library
@pytest.mark.parametrize("size", [1, 7, 50, 97, 1000])
def test_equals_itself_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Groups of 96, 24 and 8 rows, in parts that cut them, hold several of them, or all."""
    monkeypatch.setitem(align_conv_products.ROWS_PER_CHUNK, "cpu", size)
    case = make_case(dtype=torch.float64)
    assert relative_error(align_conv(*case.arguments()), align_conv_by_loops(case)) < 1e-13


@pytest.mark.parametrize("size", [1, 5, 64])
def test_parts_hold_every_row_once_and_no_more_than_they_may(size: int) -> None:
    starts = [0, 3, 3, 70, 71, 200]
    rows, groups = [], []
    for part, inside in align_conv_products._divide(starts, size):
        assert 0 < part.stop - part.start <= size
        for group, here in inside:
            rows += range(part.start + here.start, part.start + here.stop)
            groups += [group] * (here.stop - here.start)
    assert rows == list(range(200))
    assert groups == [0] * 3 + [2] * 67 + [3] + [4] * 129


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic_over_runs_and_threads(threads: int) -> None:
    case = make_case(sizes=((12, 12), (6, 6)), channels=64, outputs=85)
    gradient = torch.randn(len(case.index), 85, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        first = outputs_and_gradients(align_conv, case, gradient)
        torch.set_num_threads(threads)
        for _ in range(20):
            again = outputs_and_gradients(align_conv, case, gradient)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [3, 5])
def test_corners_in_plain_pytorch_are_those_of_the_kernels(kernel: int) -> None:
    """The deterministic backward of a GPU scatters by them."""
    case = make_case(kernel=kernel, dtype=torch.float64)
    case = replace(case, boxes=case.boxes.double())
    align_conv(*case.arguments())
    place = [case.features, case.strides, case.boxes, case.index, 3, kernel]
    columns = torch.randn(len(case.index), kernel * kernel * 8, dtype=torch.float64)
    want = torch.zeros(sum(feature[:, 0].numel() for feature in case.features), 8, dtype=torch.float64)
    torch.ops.refinedet.align_conv_scatter(want, columns, *place)
    got = torch.zeros_like(want)
    for pixel, share in find_corners(*place):
        got.index_put_((pixel.flatten(),), columns.view(-1, 8) * share.flatten()[:, None], accumulate=True)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    case = make_case()
    weight = [filters.requires_grad_() for filters in case.weight]
    with torch.autocast("cpu", dtype=dtype):
        output = align_conv(case.features, case.strides, case.boxes, case.index, weight, case.bias)
    output.float().sum().backward()
    assert output.dtype == dtype
    assert weight[0].grad is not None
    assert weight[0].grad.dtype == torch.float32
    assert relative_error(output.detach(), align_conv_by_loops(case)) < 1e-2


@needs_library
def test_compiles_without_a_graph_break() -> None:
    case = make_case()
    compiled = torch.compile(align_conv, backend="aot_eager", fullgraph=True, dynamic=True)
    gradient = torch.ones(len(case.index), 7)
    want = outputs_and_gradients(align_conv, case, gradient)
    for got, wanted in zip(outputs_and_gradients(compiled, case, gradient), want, strict=True):
        torch.testing.assert_close(got, wanted)
    few = case.rows(torch.arange(11))
    torch.testing.assert_close(compiled(*few.arguments()), align_conv(*few.arguments()))
