"""Detections come back in the original image's pixels, whatever the size, aspect and mirroring of the view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from refinedet.model import DetectionBatch, RefineDetConfig, inference
from refinedet.pipeline.config.recipes import (
    RECIPES,
    describe_cost,
    describe_source,
    estimate_cost,
    resolve_merge,
    resolve_passes,
    resolve_selection,
    resolved_settings,
)
from refinedet.pipeline.config.spec import Evaluation, MergeRule, Multiscale, Pass, Selection
from refinedet.pipeline.data.samples import Category, Sample
from refinedet.pipeline.inference.detect import detect_samples
from refinedet.pipeline.inference.multiscale import detect_in_views, detect_samples_by_rules
from refinedet.pipeline.runs.errors import UserError
from torch import Tensor, nn

CATEGORIES = (Category(7, "bright"), Category(44, "dim"))
CONFIG = RefineDetConfig(num_classes=2, input_size=128, backbone="resnet18")


class SeesRectangles(nn.Module):
    """Stands for the detector: finds the one bright or dim rectangle on black, to the pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.sizes.append(tuple(images.shape))
        return images


def find_rectangles(images: Tensor, config: RefineDetConfig) -> DetectionBatch:
    boxes, counts, labels = [], [], []
    for image in images[:, 0].float():
        ys, xs = (image > 40).nonzero().unbind(1)
        counts.append(min(len(ys), 1))
        corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0, 0, 0, 0]
        boxes.append(torch.tensor(corners).float()[None])
        labels.append([1 if image.max() > 200 else 2])
    scores = torch.full((len(boxes), 1), 0.75)
    return DetectionBatch(torch.stack(boxes), scores, torch.tensor(labels), torch.tensor(counts))


@pytest.fixture
def model(monkeypatch) -> SeesRectangles:
    monkeypatch.setattr(inference, "select_batch", find_rectangles)
    return SeesRectangles()


def picture(image_id: int, height: int, width: int, box: Sequence[int] | None, value: int = 255) -> Sample:
    image = np.zeros((height, width, 3), np.uint8)
    if box is not None:
        image[box[1] : box[3], box[0] : box[2]] = value
    none = np.zeros(0, bool)
    return Sample(f"{image_id:08d}", image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none, image_id)


PICTURES = [
    picture(3, 100, 300, (30, 10, 180, 90)),
    picture(900, 400, 200, (0, 240, 100, 400), value=120),
    picture(12, 256, 256, None),
    picture(5, 256, 256, (100, 100, 140, 200)),
]
BOXES = {3: (7, [30, 10, 150, 80]), 900: (44, [0, 240, 100, 160]), 5: (7, [100, 100, 40, 100])}


def check_boxes(table, *, tolerance: float) -> None:
    assert table.image_id.tolist() == [3, 900, 5]  # the order of the data set
    for image, category, box in zip(table.image_id, table.category_id, table.bbox, strict=True):
        assert category == BOXES[image][0]
        np.testing.assert_allclose(box, BOXES[image][1], atol=tolerance)


@pytest.mark.parametrize("merge", [None, MergeRule(method="soft_nms_linear")])
def test_boxes_and_categories_are_the_data_sets_own(model, merge):
    model.train()
    table, images = detect_samples(model, PICTURES, CATEGORIES, Evaluation(batch_size=3, merge=merge))
    check_boxes(table, tolerance=3)
    assert images == [3, 900, 12, 5]
    assert model.training
    assert model.sizes == [(3, 3, 128, 128), (1, 3, 128, 128)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [64, 256, (64, 192)])
def test_a_pass_of_any_size_finds_the_same_boxes(model, size, flip):
    multiscale = Multiscale(passes=(Pass(size=size, flip=flip),), batch_size=4)
    rules = {"vote": MergeRule(method="vote")}
    table = detect_samples_by_rules(model, PICTURES, CATEGORIES, multiscale, rules)["vote"]
    check_boxes(table, tolerance=6)
    if isinstance(size, tuple):  # the tall picture is shown upright
        assert {shape[2:] for shape in model.sizes} == {(64, 192), (192, 64)}
    assert all(shape[0] <= 4 for shape in model.sizes)


def test_size_filters_are_in_pixels_of_the_original(model):
    def kept(**limits: float) -> list[int]:
        multiscale = Multiscale(passes=(Pass(size=256, **limits),))
        tables = detect_samples_by_rules(model, PICTURES, CATEGORIES, multiscale, {"nms": MergeRule()})
        return tables["nms"].image_id.tolist()

    assert kept(min_side_below=60) == [5]
    assert kept(min_side_below=95) == [3, 5]
    assert kept(max_side_above=120) == [3, 900]


def test_published_recipes_resolve():
    for name, recipe in RECIPES.items():
        config = RefineDetConfig(input_size=recipe.input_size)
        assert resolve_passes(Multiscale(recipe=name), config) == recipe.passes
        assert resolve_merge(Multiscale(recipe=name)).method == ("vote" if "voc" in name else "soft_vote")
        view = resolve_selection(Multiscale(recipe=name), config)
        assert (view.pre_nms_top_k, view.pre_nms_scope, view.max_detections) == (1000, "class", 500)
        source = describe_source(Multiscale(recipe=name))
        assert source.startswith("coco1024: ours" if name == "coco1024" else f"{name}: sizes, limits of sides and merg")
    assert resolve_merge(Multiscale(passes=(Pass(size=64),))).method == "soft_vote"
    cost = estimate_cost(RECIPES["coco320"].passes, input_size=320, num_images=5000)
    assert cost["views"] == 18
    assert cost["images"] == 90000
    assert "18 views of each of 5000 images" in describe_cost(
        RECIPES["coco320"].passes, input_size=320, num_images=5000
    )


def test_what_each_view_keeps_is_part_of_the_recipe_and_can_be_set(model):
    own = Multiscale(passes=(Pass(size=64),))
    assert resolve_selection(own, CONFIG) == CONFIG
    few = own.model_copy(update={"selection": Selection(max_detections=1)})
    assert resolve_selection(few, CONFIG) == replace(CONFIG, max_detections=1)
    assert resolved_settings(few, CONFIG) != resolved_settings(own, CONFIG), "a test of its own, with its own digest"
    merge = {"merge": MergeRule()}
    assert describe_source(Multiscale(recipe="voc320", **merge)).endswith("; merge of the job")
    rules = {"nms": MergeRule()}
    counts = [len(detect_samples_by_rules(model, PICTURES, CATEGORIES, one, rules)["nms"]) for one in (own, few)]
    assert counts[1] <= 2 * len(PICTURES)
    assert counts[1] <= counts[0]


def test_a_square_image_is_turned_as_a_portrait_one(model):
    """The release compares `h < w`."""
    multiscale = Multiscale(passes=(Pass(size=(64, 128), flip=False),))
    shapes = ((50, 70), (70, 50), (60, 60))
    detect_in_views(model.eval(), [np.zeros((*shape, 3), np.uint8) for shape in shapes], multiscale)
    assert sorted(size for size in model.sizes) == [(1, 3, 64, 128), (2, 3, 128, 64)]


def test_passes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"multiple of the model's coarsest stride 64, received \(96, 128\)"):
        resolve_passes(Multiscale(passes=(Pass(size=(96, 128)),)), CONFIG)
    with pytest.raises(UserError, match=r"coco320 is for models of input size 320, .* 512; take voc512 or coco512"):
        resolve_passes(Multiscale(recipe="coco320"), RefineDetConfig(input_size=512))
    with pytest.raises(UserError, match=r"received model\.input_size 128; give passes such as \[{size: 128}\]"):
        resolve_passes(Multiscale(recipe="coco320"), CONFIG)
    with pytest.raises(UserError, match="neither"):
        resolve_passes(Multiscale(), CONFIG)
    with pytest.raises(UserError, match=r"must be one of coco1024, .* received coco300"):
        resolve_passes(Multiscale(recipe="coco300"), CONFIG)
