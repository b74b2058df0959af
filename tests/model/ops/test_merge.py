"""Merging boxes: loops' and the authors' answers, the plain reference as the oracle, laws that hold for any boxes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from refinedet.model.ops import merge
from torch import Tensor

from tests.model.ops.merging_by_hand import answer_by_hand, draw_rows
from tests.outside import outside

# The authors' answers lie beside the repository.
AUTHORS = [case for path in outside("golden", "box_merge.json") for case in json.loads(path.read_text())["cases"]]
BY_HAND = [answer_by_hand(draw_rows(seed, objects=1 + 4 * seed, views=1 + seed)) for seed in range(7)]


@pytest.fixture(params=["reference", "library"])
def implementation(request, monkeypatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(merge, "_is_ready", lambda: False)
    elif not merge._is_ready():
        pytest.skip("the operators are not built")
    return request.param


def random_boxes(count: int, seed: int, *, groups: int = 1, ties: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 300, (count, 2))
    sides = np.exp(rng.uniform(1, 5.3, (count, 2)))
    boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    scores = rng.random(count).astype(np.float32)
    if ties and count:
        half = count // 2
        boxes[count - half :] = boxes[:half]
        boxes, scores = boxes.round(), scores.round(1)
        boxes[0, 2:] = boxes[0, :2]  # a box without area
    return torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(rng.integers(-3, groups - 3, count))


def close(boxes: Tensor, scores: Tensor, expected: list[list[float]]) -> None:
    rows = torch.cat([boxes, scores[:, None]], 1)
    torch.testing.assert_close(rows, torch.tensor(expected).reshape(-1, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [*BY_HAND, *AUTHORS], ids=lambda case: f"{len(case['boxes_scores'])}boxes")
def test_known_answers_in_order(case, implementation):
    rows = torch.tensor(case["boxes_scores"])
    boxes, scores = rows[:, :4], rows[:, 4]
    close(*merge.vote(boxes, scores, plus_one=True)[:2], case["bbox_vote"])
    close(*merge.vote(boxes, scores, soft=True, plus_one=True)[:2], case["soft_bbox_vote"])
    for gaussian, name in ((False, "soft_nms_linear"), (True, "soft_nms_gaussian")):
        index, lowered = merge.soft_nms(boxes, scores, gaussian=gaussian, plus_one=True)
        close(boxes[index], lowered, case[name])
    kept = merge.nms(boxes, scores, iou=0.3, plus_one=True)
    close(boxes[kept], scores[kept], case["soft_nms_hard"])
    assert merge.nms(boxes, scores, iou=0.45, plus_one=True).tolist() == case["nms_0.45"]


@pytest.mark.parametrize("case", [BY_HAND[0], *AUTHORS], ids=lambda case: f"{len(case['boxes_scores'])}boxes")
def test_the_loops_give_the_authors_answers(case):
    by_hand = answer_by_hand(case["boxes_scores"])
    for name, expected in case.items():
        np.testing.assert_allclose(by_hand[name], expected, atol=1e-4, rtol=1e-6, err_msg=name)


def test_soft_nms_with_continuous_corners(implementation):
    boxes = torch.tensor([[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
    scores = torch.tensor([0.6, 0.9, 0.7, 0.2])
    for gaussian, expected in (
        (False, [0.9, 0.6, 0.29024392, 0.2]),
        (True, [0.9, 0.59630775, 0.35275510, 0.18650459]),
    ):
        index, lowered = merge.soft_nms(boxes, scores, gaussian=gaussian)
        assert index.tolist() == [1, 0, 2, 3]
        torch.testing.assert_close(lowered, torch.tensor(expected))


@pytest.mark.parametrize("implementation", ["library"], indirect=True)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 33, 200, 1100])
def test_compiled_equals_the_reference(implementation, monkeypatch, count, plus_one):

    def run(boxes: Tensor, scores: Tensor, groups: Tensor) -> list[Tensor]:
        return [
            merge.nms(boxes, scores, groups, iou=0.5, plus_one=plus_one),
            *merge.soft_nms(boxes, scores, groups, plus_one=plus_one),
            *merge.vote(boxes, scores, groups, plus_one=plus_one),
            *merge.vote(boxes, scores, groups, soft=True, plus_one=plus_one),
            *merge.vote(boxes, scores, groups, soft=True, score_threshold=0.0, plus_one=plus_one),
            *merge.weighted_box_fusion(boxes, scores, groups, num_views=3, score_threshold=0.2, plus_one=plus_one),
        ]

    def run_gaussian(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return merge.soft_nms(boxes, scores, groups, gaussian=True, plus_one=plus_one)

    for seed in range(4 if count < 1000 else 2):
        inputs = random_boxes(count, seed, groups=1 + seed, ties=seed % 2 == 1)
        compiled, (index, lowered) = run(*inputs), run_gaussian(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(merge, "_is_ready", lambda: False)
            expected, (expected_index, expected_lowered) = run(*inputs), run_gaussian(*inputs)
        for one, other in zip(compiled, expected, strict=True):
            assert torch.equal(one, other)
        # exp differs in the last place; where that swaps two boxes, their scores are the same to as much
        torch.testing.assert_close(lowered, expected_lowered, atol=1e-6, rtol=0)
        assert sorted(index.tolist()) == sorted(expected_index.tolist())


def test_groups_never_meet(implementation):
    boxes, scores, groups = random_boxes(120, 0, groups=5)
    together = merge.soft_nms(boxes, scores, groups)
    voted = merge.vote(boxes, scores, groups, soft=True)
    start = 0
    for group in groups.unique().tolist():
        own = (groups == group).nonzero().squeeze(1)
        index, lowered = merge.soft_nms(boxes[own], scores[own])
        assert torch.equal(together[0][start : start + len(index)], own[index])
        assert torch.equal(together[1][start : start + len(index)], lowered)
        start += len(index)
        alone = merge.vote(boxes[own], scores[own], soft=True)
        assert torch.equal(voted[0][voted[2] == group], alone[0])
        assert torch.equal(voted[1][voted[2] == group], alone[1])
    assert start == len(together[0])
    far_apart = torch.tensor([-(2**62), 2**62])
    kept = merge.nms(torch.tensor([[0.0, 0, 9, 9]] * 2), torch.tensor([0.5, 0.5]), far_apart, iou=0.5)
    assert kept.tolist() == [0, 1]


def test_equal_scores_stay_in_the_order_of_the_input(implementation):
    boxes = torch.tensor([[20.0 * i, 0, 20 * i + 10, 10] for i in range(40)])
    scores = torch.full((40,), 0.5)
    assert merge.nms(boxes, scores, iou=0.5).tolist() == list(range(40))
    assert merge.soft_nms(boxes, scores)[0].tolist() == list(range(40))
    assert torch.equal(merge.vote(boxes, scores, soft=True)[0], boxes)
    assert torch.equal(merge.weighted_box_fusion(boxes, scores, num_views=1)[0], boxes)
    twice = boxes.repeat_interleave(2, 0)
    assert merge.nms(twice, torch.full((80,), 0.5), iou=0.5).tolist() == list(range(0, 80, 2))


@pytest.mark.parametrize("seed", range(3))
def test_what_merging_leaves(implementation, seed):
    """Voting keeps every best score and stays in the hull of the boxes; soft-NMS never raises a score."""
    boxes, scores, _ = random_boxes(150, seed)
    for gaussian in (False, True):
        index, lowered = merge.soft_nms(boxes, scores, score_threshold=0.01, gaussian=gaussian)
        assert (lowered <= scores[index]).all()
        assert (lowered.diff() <= 0).all()
        assert lowered.min() >= 0.01
        assert len(index.unique()) == len(index)
    merged, merged_scores, _ = merge.vote(boxes, scores)
    assert merged_scores[0] == scores.max()
    assert torch.isin(merged_scores, scores).all()
    assert (merged >= boxes.amin(0) - 1e-3).all()
    assert (merged <= boxes.amax(0) + 1e-3).all()
    soft, soft_scores, _ = merge.vote(boxes, scores, soft=True)
    assert len(soft) >= len(merged)
    assert (soft_scores.diff() <= 0).all()
    fused, fused_scores, _ = merge.weighted_box_fusion(boxes, scores, num_views=4)
    assert (fused_scores <= scores.max()).all()
    assert len(fused) <= len(boxes)


def test_weighted_box_fusion_by_hand(implementation):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60]])
    scores = torch.tensor([0.8, 0.4, 0.6])
    merged, fused, _ = merge.weighted_box_fusion(boxes, scores, num_views=2, iou=0.55)
    torch.testing.assert_close(merged, torch.tensor([[0, 0, 10, (8 + 4.8) / 1.2], [50, 50, 60, 60]]))
    torch.testing.assert_close(fused, torch.tensor([0.6, 0.3]))  # the second was found in one view of two


def test_other_types_and_layouts(implementation):
    boxes, scores, groups = random_boxes(50, 0, groups=3)
    expected = merge.vote(boxes, scores, groups)
    strided = torch.stack([boxes, boxes], 2)[..., 0]
    assert not strided.is_contiguous()
    for one, other in zip(merge.vote(strided, scores, groups), expected, strict=True):
        assert torch.equal(one, other)
    double = merge.vote(boxes.double().requires_grad_(), scores.double(), groups.int())
    assert torch.equal(double[0], expected[0])
    assert double[2].dtype == torch.int32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"boxes": torch.zeros(3, 5)}, r"boxes must be \[N, 4\], received \[3, 5\]"),
        ({"scores": torch.zeros(2)}, r"scores must be \[3\] as there are boxes, received \[2\]"),
        ({"groups": torch.zeros(3)}, "groups must be integers, received torch.float32"),
        ({"boxes": torch.full((3, 4), float("nan"))}, "must be finite"),
        ({"scores": torch.tensor([0.1, float("inf"), 0.2])}, "must be finite"),
    ],
)
def test_bad_arguments(implementation, change, said):
    arguments = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "groups": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=said):
        merge.vote(**{**arguments, **change})


def test_direct_calls_of_the_operators_are_checked():
    if not merge._is_ready():
        pytest.skip("the operators are not built")
    boxes, scores, groups = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"boxes must be \[N, 4\]"):
        torch.ops.refinedet.nms(boxes[:, :3], scores, groups, 0.5, False)
    with pytest.raises(RuntimeError, match="received 2 values"):
        torch.ops.refinedet.nms(boxes, scores[:2], groups, 0.5, False)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.refinedet.nms(boxes.double(), scores, groups, 0.5, False)


def test_coordinates_near_the_end_of_the_numbers(implementation):
    """Sides and areas overflow; what comes out is among what went in, and nothing outside is read."""
    boxes = torch.tensor([[-3e38, -3e38, 3e38, 3e38], [0, 0, 1, 1], [3e38, 3e38, 3.1e38, 3.1e38], [0, 0, 1e-38, 1e-38]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    with np.errstate(all="ignore"):
        for gaussian in (False, True):
            index, lowered = merge.soft_nms(boxes, scores, gaussian=gaussian)
            assert set(index.tolist()) <= {0, 1, 2, 3}
            assert lowered.isfinite().all()
        assert len(merge.nms(boxes, scores, iou=0.5)) <= 4
        assert len(merge.vote(boxes, scores, soft=True)[1]) <= 8
