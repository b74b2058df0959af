"""Detection on a GPU: suppression equal to the CPU's, no host that waits, captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig, detection_loss
from refinedet.model.inference import select_batch
from refinedet.model.ops.suppress import suppress, suppress_reference

from tests.model.cases import random_images, random_targets
from tests.model.ops.test_suppress import random_candidates

pytestmark = pytest.mark.gpu


def make_detector(gpu: torch.device) -> RefineDet:
    torch.manual_seed(0)
    config = RefineDetConfig(num_classes=80, input_size=320, backbone="resnet18", prediction_block=False, theta=0.6)
    return RefineDet(config).to(gpu, memory_format=torch.channels_last)


@pytest.mark.parametrize("candidates", [1, 64, 400, 1300])
@pytest.mark.parametrize(("iou", "threshold", "most"), [(0.5, 0.0, 2000), (0.3, 0.5, 20), (1.0, 0.2, 50)])
def test_suppression_equals_the_reference(gpu: torch.device, candidates: int, iou: float, threshold, most: int) -> None:
    given = random_candidates(5, candidates)
    want = suppress_reference(*given, iou, threshold, most)
    got = suppress(*(part.to(gpu) for part in given), iou, threshold, most)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_the_host_never_waits_after_the_head(gpu: torch.device) -> None:
    detector = make_detector(gpu).eval()
    with torch.no_grad():
        predictions = detector(random_images(torch.Generator().manual_seed(0), 8, 320).to(gpu))
        select_batch(predictions, detector.config)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = select_batch(predictions, detector.config)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found.counts.sum() > 0


@pytest.mark.parametrize("batch", [1, 8])
def test_detection_captured_in_a_cuda_graph(gpu: torch.device, batch: int) -> None:
    detector = make_detector(gpu).eval()
    generator = torch.Generator().manual_seed(0)
    images = random_images(generator, batch, 320).to(gpu)
    capacity = batch * 2000
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        detector.detect_padded(images, capacity)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = detector.detect_padded(images, capacity)
    for _ in range(2):
        images.copy_(random_images(generator, batch, 320))
        graph.replay()
        want = detector.detect_padded(images, capacity)
        assert torch.equal(found.counts, want.counts)
        assert torch.equal(found.labels, want.labels)
        assert torch.allclose(found.scores, want.scores, atol=1e-3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_of_training(gpu: torch.device, precision: torch.dtype) -> None:
    detector = make_detector(gpu)
    generator = torch.Generator().manual_seed(0)
    images = random_images(generator, 2, 320).to(gpu)
    targets = [random_targets(generator, 5, 320, 80).to(gpu) for _ in range(2)]
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        predictions = detector(images, targets)
    losses = detection_loss(predictions, targets, detector.config)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in detector.parameters())


def test_batch_and_single_images_detect_the_same(gpu: torch.device) -> None:
    detector = make_detector(gpu).eval()
    images = random_images(torch.Generator().manual_seed(0), 3, 320).to(gpu)
    for image, together in enumerate(detector.detect(images)):
        (alone,) = detector.detect(images[image : image + 1])
        assert abs(len(alone.scores) - len(together.scores)) <= 2
        assert torch.allclose(alone.scores[:20], together.scores[:20], atol=1e-3)
