"""Inputs of the evaluate and multiscale stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from refinedet.pipeline.config.recipes import resolved_settings, rules_to_compare
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec, MergeRule, Multiscale
from refinedet.pipeline.data.index import ShardSet, check_same_categories, open_shards
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.evaluation.metrics import protocol_of
from refinedet.pipeline.evaluation.protocols import Protocol
from refinedet.pipeline.inference.weight_files import load_whole_detector
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

Mode = Literal["single", "multiscale"]
OWN_METHOD = ""
"""name of the job's own merge method among those that are compared"""


@dataclass(frozen=True)
class DetectionJob:
    """Inputs of a detection: everything that a chunk depends on is in `fingerprint`.

    weights      file of a detector that the run's spec describes
    shards       directory of the shards with the images
    truth        COCO instances file of those images, in the shards' order
    output       directory that detections/, metrics.json and the chunks are written to
    protocol     how the detections are measured
    merge_rules  to be compared on the same passes, by name
    format       of the data set: coco, voc or shapes
    image_set    VOC's year and list, as in VOC2012/test
    diagnose     also find what the errors are
    trace_images  images whose objects are followed through the detector
    """

    mode: Mode
    name: str
    weights: str
    shards: str
    truth: str
    output: str
    image_ids: tuple[int, ...]
    fingerprint: str
    protocol: Protocol
    merge_rules: Mapping[str, MergeRule]
    format: str
    image_set: str
    diagnose: bool = False
    trace_images: int = 0

    @property
    def folder(self) -> str:
        """Directory of the committed chunks."""
        return storage.join(self.output, "detections", self.mode)

    def rule_folder(self, name: str) -> str:
        """Directory of the committed chunks of one of `merge_rules`."""
        return storage.join(self.folder, re.sub(r"[^a-z0-9.+]+", "-", name.lower()))

    def rule_fingerprint(self, name: str) -> str:
        return storage.digest_json([self.fingerprint, self.merge_rules[name].model_dump(mode="json")])

    @property
    def detections(self) -> str:
        """The finished COCO results file."""
        return storage.join(self.output, "detections", f"{self.mode}.json")


def make_detection_job(
    run: Run, mode: Mode, *, weights: str | None = None, shards: str | None = None, output: str | None = None
) -> tuple[DetectionJob, dict[str, Any]]:
    """The job of a run's own weights and validation shards, or of others; and the inputs it depends on, as JSON.

    Raises UserError where there are no weights, or where they or the shards are of another model, or the shards' labels
    mean other categories than those of the training shards, where these exist.
    """
    spec = run.spec
    found = _open_matching_shards(run, shards or storage.join(run.shards, "val"))
    if weights:
        load_whole_detector(spec.model, weights, "--weights")
    elif not storage.exists(run.weights):
        raise UserError(f"There are no weights at {run.weights}; run the stage train first, or name others.")
    weights = weights or run.weights
    output = output or run.path
    truth = storage.join(output, "ground_truth.json")  # the run's own, unless the results go elsewhere
    write_coco_annotations(found, truth)
    multiscale = spec.multiscale if mode == "multiscale" else None
    diagnose = spec.evaluation.diagnose
    detected = {
        "weights": storage.digest_file(weights).sha256,
        "shards": found.digest,
        "spec": storage.digest_json(_detection_settings(spec, multiscale)),
    }
    listed = spec.data.val[0].set if spec.data.val and not shards else None  # shards of earlier releases do not name it
    image_set = found.sets[0] if found.sets else listed
    protocol = protocol_of(spec.evaluation, found.format, image_set)
    job = DetectionJob(
        mode=mode,
        name=spec.name,
        weights=weights,
        shards=found.url,
        truth=truth,
        output=output,
        image_ids=tuple(image["id"] for image in storage.read_json(truth)["images"]),
        fingerprint=storage.digest_json(detected),
        protocol=protocol,
        merge_rules=rules_to_compare(multiscale) if multiscale and multiscale.compare_rules else {},
        format=found.format,
        image_set=image_set or f"{'VOC2007' if protocol.metric == 'voc2007' else 'VOC2012'}/test",
        diagnose=diagnose,
        trace_images=spec.evaluation.trace_images if diagnose and mode == "single" else 0,
    )
    compared = {name: job.rule_fingerprint(name) for name in job.merge_rules}
    return job, {
        **detected,
        "protocol": storage.digest_json(protocol.to_json()),
        "diagnosis": storage.digest_json([job.diagnose, job.trace_images]),
        "merge_rules": storage.digest_json(compared),
    }


def _open_matching_shards(run: Run, url: str) -> ShardSet:
    """Open the shards to detect in; UserError where their categories are not those that the model was trained on."""
    found = open_shards(url)
    if found.num_classes != run.spec.model.num_classes:
        raise UserError(
            f"The shards {found.url} have {found.num_classes} categories, the model has {run.spec.model.num_classes}; "
            "give shards of the data set that it was trained on."
        )
    trained_on = storage.join(run.shards, "train")
    if storage.exists(storage.join(trained_on, "index.json")):
        check_same_categories(open_shards(trained_on), found)
    return found


def _detection_settings(spec: JobSpec, multiscale: Multiscale | None) -> dict[str, Any]:
    """Settings that detections depend on. Without defaults: a key that a later version adds changes no digest."""
    include: Any = {"model": True, "evaluation": {"batch_size", "merge", "precision"}}
    settings = spec.model_dump(mode="json", include=include, exclude_defaults=True)
    return {**settings, "multiscale": multiscale and resolved_settings(multiscale, spec.model)}
