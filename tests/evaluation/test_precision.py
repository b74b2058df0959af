"""The evaluation stages and the validation compute in `evaluation.precision`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.evaluation import detection_worker
from refinedet.pipeline.evaluation.chunks import split_into_chunks
from refinedet.pipeline.evaluation.detection_job import make_detection_job
from refinedet.pipeline.evaluation.detection_worker import DetectionWorker
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.validation import prepare_validation
from refinedet.pipeline.inference import precision as precisions
from refinedet.pipeline.training.world import World
from safetensors.torch import save_file

CASES = [("bf16", {}, torch.bfloat16), ("fp32", {"avx512_bf16": True}, torch.float32)]
CASES += [("auto", {"avx512_bf16": True}, torch.bfloat16), ("auto", {}, torch.float32)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of the backbone's maps, at each forward pass of any detector."""
    seen: list[torch.dtype] = []
    forward = RefineDet.forward

    def watched(self: RefineDet, *args: Any, **options: Any) -> Any:
        with self.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps[-1].dtype)):
            return forward(self, *args, **options)

    monkeypatch.setattr(RefineDet, "forward", watched)
    return seen


@pytest.mark.parametrize(("precision", "capabilities", "expected"), CASES)
def test_all_of_an_evaluation_computes_in_the_precision_of_the_spec(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    computed: list[torch.dtype],
    precision: str,
    capabilities: dict[str, bool],
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(detection_worker, "log_to_file", lambda *_, **__: None)
    monkeypatch.setattr(precisions.torch.cpu, "get_capabilities", lambda: capabilities)
    spec = {
        "name": "job",
        "runs": str(tmp_path),
        "data": {"format": "shapes", "image_size": 96, "train": [{"count": 4}], "val": [{"count": 4}]},
        "model": {
            "num_classes": 10, "input_size": 64, "backbone": "test_resnet", "tcb_channels": 16,
            "prediction_block": False, "theta": 1.0,
        },
        "training": {"validate_every_epochs": 1},
        "evaluation": {"precision": precision},
        "multiscale": {"passes": [{"size": 64}]},
    }  # fmt: skip
    run = Run(JobSpec.model_validate(spec))
    write_coco_annotations(prepare_shards(run.spec.data, "val", f"{run.shards}/val"), run.ground_truth("val"))
    torch.manual_seed(0)
    detector = RefineDet(run.spec.model).eval()
    save_file(detector.state_dict(), run.weights)
    worker = DetectionWorker(run.spec_for_workers())
    for mode, passes in (("single", 2), ("multiscale", 1)):  # the single-scale one traces objects once more
        job, _ = make_detection_job(run, mode)  # type: ignore[arg-type]
        worker.begin(job, GroundTruth.of(job.truth), 0)
        (chunk,) = split_into_chunks(4, 4)
        worker.work(chunk)
        assert computed == [expected] * passes
        computed.clear()
    validate = prepare_validation(run, World())
    assert validate is not None
    values = validate(detector, 1)
    assert "AP" in values
    assert computed == [expected]


def test_another_precision_is_another_evaluation(tmp_path: Path) -> None:
    """Its chunks are detected anew; the default, as of earlier releases, is not."""
    fingerprints = []
    for evaluation in ({}, {"precision": "auto"}, {"precision": "fp32"}):
        spec = {
            "name": "job",
            "runs": str(tmp_path),
            "data": {"format": "shapes", "image_size": 96, "train": [{"count": 4}], "val": [{"count": 2}]},
            "model": {"num_classes": 10, "input_size": 64, "backbone": "test_resnet", "tcb_channels": 16},
            "evaluation": evaluation,
        }
        run = Run(JobSpec.model_validate(spec))
        prepare_shards(run.spec.data, "val", f"{run.shards}/val")
        Path(run.weights).write_bytes(b"weights")
        fingerprints.append(make_detection_job(run, "single")[0].fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
