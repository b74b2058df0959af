"""Exported graphs against the eager model, on drawn pictures, and on real photos where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refinedet.model import RefineDet
from refinedet.model.anchors import order_rows
from refinedet.model.export import DetectionGraph, export_onnx, export_program, finish_detections
from refinedet.model.ops.align_conv_reference import align_conv_reference
from refinedet.model.portable import align_conv_portable
from torch import Tensor

from tests.model.cases import random_images
from tests.outside import outside

PHOTOS = outside("data", "coco-mini", "val2017")


def draw_picture(seed: int, size: int) -> Tensor:
    """Grained discs and ellipses on a slope of grey, uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    x, y = torch.arange(size).float(), torch.arange(size).float()[:, None]
    picture = (60 + 120 * (x * draw(1) + y * draw(1)) / (2 * size)).expand(3, size, size).clone()
    for number in range(6):
        left, top, radius = (draw(3) * torch.tensor([1.0, 1.0, 0.3]) * size).tolist()
        across = (x - left).abs() if number % 2 else (x - left).abs() * 3
        inside = across**2 + (y - top) ** 2 < radius**2
        picture[:, inside] = (draw(3) * 255)[:, None]
    return (picture + 40 * (draw(3, size, size) - 0.5)).clamp(0, 255).to(torch.uint8)


def read_photo(path: Path, size: int) -> Tensor:
    cv2 = pytest.importorskip("cv2")
    photo = cv2.resize(cv2.imread(str(path)), (size, size))[..., ::-1].copy()
    return torch.from_numpy(photo).permute(2, 0, 1)


def make_images(source: Path | None, size: int, count: int = 4) -> Tensor:
    """Images [count, 3, size, size] of a directory of photos, or drawn ones."""
    if source is None:
        return torch.stack([draw_picture(seed, size) for seed in range(count)])
    return torch.stack([read_photo(path, size) for path in sorted(source.glob("*.jpg"))[:count]])


def build_decided(build, **options) -> RefineDet:
    """A detector whose scores differ: those of an untrained one tie to the last digits, and rounding orders them."""
    model = build(**options).eval()
    for filters in model.adm.cls:
        filters.weight.data.mul_(50)
    return model


@pytest.fixture(params=[None, *PHOTOS], ids=lambda source: "photos" if source else "drawn")
def source(request) -> Path | None:
    return request.param


def assert_same_detections(model, images, boxes, scores):
    with torch.no_grad():
        eager_boxes, eager_scores = DetectionGraph(model)(images)
    assert (boxes - eager_boxes).abs().max() < 1e-3
    assert (scores - eager_scores).abs().max() < 1e-3
    ours = finish_detections(boxes, scores, model.config)
    assert sum(len(found.scores) for found in ours) > 0
    for one, eager in zip(ours, model.detect(images), strict=True):
        assert len(one.scores) == len(eager.scores)
        assert (one.scores - eager.scores).abs().max() < 1e-3
        # Every detection exists; two that score alike to the last digits may change places.
        distance = (one.boxes[:, None] - eager.boxes).abs().amax(-1)
        distance[one.labels[:, None] != eager.labels] = torch.inf
        assert distance.amin(1).max() < 1e-3
        assert distance.amin(0).max() < 1e-3


@pytest.mark.parametrize("kernel", [3, 5])
def test_portable_align_conv_is_align_conv(kernel):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features = [draw(2, 8, 6, 10), draw(2, 8, 3, 5)]
    count = 3 * (60 + 15)
    boxes = torch.cat([draw(2, count, 2) * 40, draw(2, count, 2) * 40 + 60], dim=-1)
    weight, bias = [draw(3, 7, 8, kernel, kernel) for _ in range(2)], [draw(3, 7) for _ in range(2)]
    ours = align_conv_portable(features, (8, 16), boxes, weight, bias)
    order = order_rows(2, 48, 80, (8, 16))[:-1]
    rows = torch.arange(2 * count)
    expected = align_conv_reference(features, (8, 16), boxes.flatten(0, 1)[order], rows, weight, bias)
    assert torch.allclose(ours.flatten(0, 1)[order], expected, atol=1e-3)


def test_exported_program_detects_the_same(build, source):
    model = build_decided(build, theta=0.6)
    program = export_program(model, 64, 64).module()
    for count in (1, 4):  # the batch is free
        images = make_images(source, 64, count)
        with torch.no_grad():
            boxes, scores = program(images)
        assert_same_detections(model, images, boxes, scores)
    assert not model.adm.portable


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"theta": 0.6, "input_size": 128}, {"head": "deform"}, {"head": "vanilla"}])
def test_onnx_runtime_detects_the_same(build, source, tmp_path, options):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build_decided(build, **options)
    size = model.config.input_size
    export_onnx(model, tmp_path / "model.onnx", size, size)
    images = make_images(source, size)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    boxes, scores = session.run(["boxes", "scores"], {"images": images.numpy()})
    assert_same_detections(model, images, torch.from_numpy(boxes), torch.from_numpy(scores))


def test_random_images(build):
    model = build_decided(build, head="vanilla")
    images = random_images(torch.Generator().manual_seed(0), 3)
    with torch.no_grad():
        boxes, scores = export_program(model, 64, 64).module()(images)
    assert_same_detections(model, images, boxes, scores)
