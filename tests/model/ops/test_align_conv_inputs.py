"""Inputs of AlignConv: what is refused, with what was received, and rows of a fixed number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refinedet.model.ops.align_conv import align_conv, top_rows

from tests.model.ops.align_conv_cases import (
    Case,
    make_case,
    needs_library,
)


def _replaced(**changes) -> Case:
    return replace(make_case(), **changes)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (_replaced(strides=[8, 16]), "received 3, 2, 3 and 3"),
        (_replaced(features=[]), "received 0, 3"),
        (make_case().to(torch.int32), "received torch.int32"),
        (_replaced(features=make_case(channels=9).features), r"received \[2, 9, 6, 8\]"),
        (_replaced(weight=make_case(kernel=5).weight[:1] + make_case().weight[1:]), r"received \[3, 7, 8, 3, 3\]"),
        (_replaced(weight=[torch.zeros(3, 7, 8, 2, 2)] * 3), r"K in \(3, 5, 7\), received"),
        (_replaced(weight=make_case(dtype=torch.float64).weight), "received torch.float64 on cpu"),
        (_replaced(bias=[bias.to("meta") for bias in make_case().bias]), "received torch.float32 on meta"),
        (_replaced(index=torch.zeros(3, dtype=torch.int32)), r"rows must be .* received \[3\] torch.int32"),
        (_replaced(index=torch.arange(4)), r"boxes must be \[4, 4\] float32 or float64, received \[384, 4\]"),
        (_replaced(boxes=make_case().boxes.half()), "received .* torch.float16"),
        (_replaced(boxes=make_case().boxes.to("meta")), "boxes must be on cpu as the features are, received meta"),
    ],
)
def test_says_what_it_received(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_conv(*case.arguments())


@needs_library
def test_the_operators_themselves_are_safe_to_call() -> None:
    case = make_case()
    align_conv(*case.arguments())
    place = [case.features, case.strides, case.boxes, case.index, 3, 3]
    columns = torch.ops.refinedet.align_conv_columns(*place)
    assert columns.shape == (len(case.index), 72)
    for change, message in (
        ({2: case.boxes[:5]}, "boxes must be"),
        ({1: [8]}, "every level needs a stride"),
        ({5: 4}, "the kernel must be 3, 5 or 7"),
        ({0: [*case.features[:2], case.features[2][:1]]}, "the features of level 2 must be"),
        ({3: case.index.int()}, "rows must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.refinedet.align_conv_columns(*[change.get(i, value) for i, value in enumerate(place)])
    cells = torch.zeros(sum(feature[:, 0].numel() for feature in case.features), 8)
    with pytest.raises(RuntimeError, match="grad must be"):
        torch.ops.refinedet.align_conv_scatter(cells[1:], columns, *place)
    with pytest.raises(RuntimeError, match="columns must be"):
        torch.ops.refinedet.align_conv_scatter(cells, columns[1:], *place)


@needs_library
def test_top_rows_keeps_the_best_in_order_and_pads() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.05, 0.7])
    assert top_rows(scores, 4, threshold=0.2).tolist() == [1, 2, 3, 5]
    assert top_rows(scores, 2, threshold=0.2).tolist() == [1, 3]
    assert top_rows(scores, 5, threshold=0.75).tolist() == [1, 3, 6, 6, 6]
    with pytest.raises(ValueError, match="received 7"):
        top_rows(scores, 7, threshold=0.2)


def test_fixed_capacity_equals_the_survivors() -> None:
    case = make_case(dtype=torch.float64)
    scores = torch.rand(len(case.index), generator=torch.Generator().manual_seed(3))
    rows = top_rows(scores, 200, threshold=0.7)
    fixed = replace(case, boxes=case.boxes[rows.clamp(max=len(case.index) - 1)], index=rows)
    survivors = torch.nonzero(scores >= 0.7).squeeze(1)
    assert 0 < len(survivors) < 200
    output = align_conv(*fixed.arguments())
    torch.testing.assert_close(output[: len(survivors)], align_conv(*case.rows(survivors).arguments()))
    assert (output[len(survivors) :] == 0).all()
