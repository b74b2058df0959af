"""Detection on real shards by a real model: the same numbers alone, on several ranks, and in chunks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.config.recipes import MERGE_RULES, resolve_merge
from refinedet.pipeline.config.spec import Data, Evaluation, Multiscale, Pass, Split
from refinedet.pipeline.data import shard_file
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.reading import EvaluationSamples, write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.evaluation.chunk_work import detect_chunk
from refinedet.pipeline.evaluation.chunks import split_into_chunks
from refinedet.pipeline.evaluation.merge_comparison import format_comparison, sort_by_metric
from refinedet.pipeline.evaluation.metrics import (
    accumulate_matches,
    evaluate,
    make_protocol,
    match_detections,
    usual_metric,
)
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import sum_unreadable
from refinedet.pipeline.evaluation.validation import validate
from refinedet.pipeline.inference.detect import detect_samples
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.inference.multiscale import detect_samples_by_rules
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.world import World

from tests.data.shape_files import write_shapes

COCO = make_protocol("coco")
EVALUATION = Evaluation(
    batch_size=1, precision="fp32"
)  # results of a convolution may differ in the last bit with the batch's size


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    data = Data(format="shapes", image_size=96, val=(Split(count=7),))
    return prepare_shards(data, "val", str(tmp_path_factory.mktemp("shards")))


@pytest.fixture(scope="module")
def truth(shards, tmp_path_factory) -> GroundTruth:
    path = str(tmp_path_factory.mktemp("truth") / "instances.json")
    write_coco_annotations(shards, path)
    return GroundTruth.of(path)


@pytest.fixture(scope="module")
def model(shards) -> RefineDet:
    torch.manual_seed(0)
    config = RefineDetConfig(
        num_classes=shards.num_classes, input_size=64, backbone="resnet18", tcb_channels=16, max_detections=20
    )
    return RefineDet(config)


@dataclass(frozen=True)
class Thread:
    """A rank in a thread; the others see what it gathers."""

    rank: int
    objects: list[Any]
    barrier: threading.Barrier

    @property
    def size(self) -> int:
        return len(self.objects)

    def all_gather_object(self, value: Any) -> list[Any]:
        self.objects[self.rank] = value
        self.barrier.wait(timeout=60)
        return list(self.objects)

    def from_main(self, call: Any) -> Any:
        return call()


def run_ranks(size: int, run) -> list[Any]:
    results: list[Any] = [None] * size
    objects, barrier = [None] * size, threading.Barrier(size)

    def target(rank: int) -> None:
        try:
            results[rank] = run(Thread(rank, objects, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def detect(model, shards, positions):
    return detect_samples(model, EvaluationSamples(shards, positions), shards.categories, EVALUATION)[0]


@pytest.mark.parametrize("rule", ["coco", "voc2007", "voc2012"])
def test_validation_is_the_same_on_any_number_of_ranks(model, shards, truth, rule):
    truth = truth.select(~truth.crowd)  # VOC has no rule for crowds
    model.eval()  # threads share the model
    whole = evaluate(rule, truth, detect(model, shards, range(shards.num_samples)))

    def run(ranks: Thread):
        return validate(
            model,
            shards,
            truth,
            ranks,
            evaluation=EVALUATION,
            protocol=make_protocol(rule),
            max_bad_samples=10,
        ).values

    assert run_ranks(3, run) == [whole.values] * 3


def test_voc_sets_are_measured_by_their_years_rule():
    assert [usual_metric("voc", name) for name in ("VOC2007/test", "VOC2012/val", None)] == [
        "voc2007",
        "voc2012",
        "voc2012",
    ]
    assert usual_metric("coco", None) == usual_metric("shapes", "VOC2007/test") == "coco"


def test_a_rank_that_fails_fails_all_and_is_named(model, shards, truth):
    def run(ranks: Thread):
        broken = "not shards" if ranks.rank == 1 else shards
        return validate(
            model,
            broken,  # pyright: ignore[reportArgumentType]
            truth,
            ranks,
            evaluation=EVALUATION,
            protocol=COCO,
            max_bad_samples=10,
        )

    for outcome in run_ranks(2, run):
        assert isinstance(outcome, RuntimeError)
        assert "1 of 2 ranks: rank 1: AttributeError" in str(outcome)


def _decode_leniently(content: bytes) -> tuple[np.ndarray | None, str | None]:
    """OpenCV's reading of an image: the missing rest of a JPEG is grey."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), None


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[ShardSet, str]:
    """12 images, 11 of them cut short, in shards of a writer that did not notice: every checksum is right."""
    folder = tmp_path_factory.mktemp("damaged")
    write_shapes(str(folder), 12, seed=1, image_size=64)
    for path in sorted((folder / "train").iterdir())[1:]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    split = Split(images="train", annotations="annotations/instances_train.json")
    data = Data(format="coco", root=str(folder), train=(split,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_file, "decode_image", _decode_leniently)
        shards = prepare_shards(data, "train", str(folder / "shards"))
    assert shards.num_samples == 12
    write_coco_annotations(shards, str(folder / "truth.json"))
    return shards, str(folder / "truth.json")


def test_the_jobs_own_limit_of_bad_samples_counts(model, damaged):
    damaged, truth_file = damaged
    positions, multiscale = range(damaged.num_samples), Multiscale(passes=(Pass(size=64, flip=False),))
    truth = GroundTruth.of(truth_file)

    def validate_alone(**limit: int):
        return validate(
            model,
            damaged,
            truth,
            World(),
            evaluation=EVALUATION,
            protocol=COCO,
            **limit,
        )

    validate_alone(max_bad_samples=11)
    with pytest.raises(UserError, match=r"11 images cannot be read, data\.max_bad_samples allows 10"):
        validate_alone(max_bad_samples=10)
    # One limit for all chunks: each of these alone would pass.
    for settings in ({}, {"multiscale": multiscale, "merge_methods": {"": MERGE_RULES["NMS 0.45"]}}):
        found = [
            detect_chunk(model, damaged, chunk.positions, evaluation=EVALUATION, **settings)[""]
            for chunk in split_into_chunks(len(positions), 4)
        ]
        unreadable = sum_unreadable((one.unreadable for one in found), 11)
        assert len(unreadable) == 11
        assert all(image.file_name.endswith((".jpg", ".png")) for image in unreadable)
        ids = {image.image_id for image in unreadable}
        assert not ids & set(np.concatenate([one.detections.image_id for one in found]).tolist())
        with pytest.raises(UserError, match="allows 10"):
            sum_unreadable((one.unreadable for one in found), 10)


def test_a_validation_that_takes_too_long_is_ended_on_all_ranks(model, shards, truth):
    def run(ranks: Thread):
        return validate(
            model,
            shards,
            truth,
            ranks,
            evaluation=EVALUATION.model_copy(update={"validation_timeout_s": 1e-9}) if ranks.rank else EVALUATION,
            protocol=COCO,
            max_bad_samples=10,
        )

    for outcome in run_ranks(2, run):
        assert isinstance(outcome, RuntimeError)
        assert "rank 1: TimeoutError: 0 of 4 images" in str(outcome)


def test_chunks_matched_apart_equal_the_whole(model, shards, truth):
    chunks = split_into_chunks(shards.num_samples, 3)
    ids = [[sample.image_id for sample in EvaluationSamples(shards, chunk.positions)] for chunk in chunks]
    tables = [detect(model, shards, chunk.positions) for chunk in chunks]
    apart = accumulate_matches(
        COCO, truth, [match_detections(COCO, truth, table, part) for table, part in zip(tables, ids, strict=True)]
    )
    together = DetectionTable.concatenate(tables)
    assert apart.values == evaluate("coco", truth, together).values
    assert len(together) > 0


def test_multiscale_of_a_real_model(model, shards, truth):
    multiscale = Multiscale(passes=(Pass(size=64), Pass(size=(64, 128)), Pass(size=128, min_side_below=40)))
    rules = {"own": resolve_merge(multiscale)}
    table = detect_samples_by_rules(model, EvaluationSamples(shards), shards.categories, multiscale, rules)["own"]
    assert 0 <= evaluate("coco", truth, table).values["AP"] <= 1
    boxes = table.bbox.copy()
    boxes[:, 2:] += boxes[:, :2]
    assert boxes.min() >= 0
    assert boxes.max() <= 96


def test_every_merge_rule_from_one_look(model, shards, truth):
    multiscale = Multiscale(passes=(Pass(size=64), Pass(size=128)))
    samples = EvaluationSamples(shards)
    tables = detect_samples_by_rules(model, samples, shards.categories, multiscale, MERGE_RULES)
    assert tables.keys() == MERGE_RULES.keys()
    rules = {"alone": MERGE_RULES["box voting"]}
    alone = detect_samples_by_rules(model, samples, shards.categories, multiscale, rules)
    assert tables["box voting"].rows() == alone["alone"].rows()
    metrics = sort_by_metric({name: evaluate("coco", truth, table) for name, table in tables.items()})
    ap = [one.values["AP"] for one in metrics.values()]
    assert ap == sorted(ap, reverse=True)
    lines = format_comparison(metrics).splitlines()
    assert len(lines) == 1 + len(MERGE_RULES)
    assert len({len(line) for line in lines}) == 1
