"""Results of the evaluate and multiscale stages: numbers from the chunks' answers, and the files of a run.

Rows go from the committed chunks to the results file chunk by chunk, as they are: the detections of all images are
never in memory together, unless a server's format requires them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from refinedet.model import RefineDetConfig
from refinedet.pipeline.evaluation.chunks import Chunk, CommittedRows, read_rows
from refinedet.pipeline.evaluation.detection_job import OWN_METHOD, DetectionJob
from refinedet.pipeline.evaluation.detection_worker import ChunkAnswer
from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import Diagnosis
from refinedet.pipeline.evaluation.diagnosis_stages import summarize_levels
from refinedet.pipeline.evaluation.merge_comparison import sort_by_metric
from refinedet.pipeline.evaluation.metrics import accumulate_matches
from refinedet.pipeline.evaluation.protocols import Metrics
from refinedet.pipeline.evaluation.server_files import write_submission, write_voc_files
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import UnreadableImage, unreadable_to_json
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError

_LAST_COCO_ID = 90


@dataclass(frozen=True)
class Detected:
    """Results of a stage.

    metrics         None where the truth has no annotations, as test-dev's
    by_merge_rule   of the methods that were compared, best first
    num_detections  in the results file
    diagnosis       what the errors are; None where it was not asked for, or the truth has marks that it has no rule for
    files           written, relative to the job's output
    damaged         chunk files that existed, but were damaged or of another evaluation, and were done again
    unreadable      images that could not be decoded, and have no detections
    """

    metrics: Metrics | None
    by_merge_rule: Mapping[str, Metrics]
    diagnosis: Diagnosis | None
    num_detections: int
    files: Sequence[str]
    damaged: Sequence[str]
    unreadable: tuple[UnreadableImage, ...]


def conclude(
    job: DetectionJob,
    config: RefineDetConfig,
    truth: GroundTruth | None,
    answers: Mapping[Chunk, ChunkAnswer],
    unreadable: tuple[UnreadableImage, ...],
) -> Detected:
    """Metrics and diagnosis of all chunks, written with the detections.

    truth    None where the data set has no annotations
    answers  of every chunk, in any order
    """
    chunks = sorted(answers, key=lambda chunk: chunk.index)
    ordered = [answers[chunk] for chunk in chunks]

    def measure(method: str) -> Metrics | None:
        if truth is None:
            return None
        return accumulate_matches(job.protocol, truth, [answer.matches[method] for answer in ordered])

    metrics = measure(OWN_METHOD)
    compared = {name: measure(name) for name in job.merge_rules}
    by_rule = sort_by_metric({name: one for name, one in compared.items() if one is not None})
    diagnosis = _diagnose(config, truth, ordered)
    count = _write_rows(job, chunks)
    _write_metrics(job, metrics, by_rule, unreadable, diagnosis)
    files = [f"detections/{job.mode}.json", *_write_for_server(job, chunks)]
    damaged = [answer.damaged for answer in ordered if answer.damaged]
    return Detected(metrics, by_rule, diagnosis, count, files, damaged, unreadable)


def _diagnose(config: RefineDetConfig, truth: GroundTruth | None, answers: Sequence[ChunkAnswer]) -> Diagnosis | None:
    examined = [answer.examined for answer in answers if answer.examined is not None]
    if truth is None or not examined:
        return None
    traced = [answer.traced for answer in answers if answer.traced is not None]
    return diagnose(truth, examined, summarize_levels(config, sum(traced[1:], traced[0])) if traced else ())


def _write_metrics(
    job: DetectionJob,
    metrics: Metrics | None,
    by_merge_rule: Mapping[str, Metrics],
    unreadable: tuple[UnreadableImage, ...],
    diagnosis: Diagnosis | None,
) -> None:
    """Write the mode's part of metrics.json; what it holds of the other mode stays."""
    path = storage.join(job.output, "metrics.json")
    known = storage.read_json(path) if storage.exists(path) else {}
    known.pop(job.mode, None)
    if metrics is not None:
        known[job.mode] = {**metrics.to_json(), "unreadable": unreadable_to_json(unreadable)}
        if diagnosis is not None:
            known[job.mode]["diagnosis"] = diagnosis.to_json()
    if job.mode == "multiscale":
        known.pop("merge_rules", None)
        if by_merge_rule:
            known["merge_rules"] = [{"rule": name, **one.values} for name, one in by_merge_rule.items()]
    if known or storage.exists(path):
        storage.write_json(path, known)


def _write_rows(job: DetectionJob, chunks: Sequence[Chunk]) -> int:
    """Write the COCO results file, by image in the order of the data set, best first; returns the number of rows."""
    count = 0

    def parts() -> Iterator[bytes]:
        nonlocal count
        yield b"["
        for chunk in chunks:
            committed = _committed(job, chunk)
            if committed.count:
                yield (b"," if count else b"") + committed.rows[1:-1]
                count += committed.count
        yield b"]"

    storage.write_parts(job.detections, parts())
    return count


def _committed(job: DetectionJob, chunk: Chunk) -> CommittedRows:
    committed = storage.retry(lambda: read_rows(job.folder, chunk, fingerprint=job.fingerprint), chunk.name)
    if committed is None:
        path = storage.join(job.folder, chunk.name)
        raise JobError(f"{path} was damaged after it was committed; run the same command again to resume")
    return committed


def _write_for_server(job: DetectionJob, chunks: Sequence[Chunk]) -> list[str]:
    """VOC's text files, in the directories that its server wants in the archive; COCO's zip for a set without truth."""
    if job.format not in ("coco", "voc"):
        return []
    truth = storage.read_json(job.truth)

    def table() -> DetectionTable:
        return DetectionTable.concatenate(
            DetectionTable.of(json.loads(_committed(job, chunk).rows)) for chunk in chunks
        )

    if job.format == "voc":
        year, _, image_set = job.image_set.rpartition("/")
        folder = f"submission/{job.mode}/results/{year}/Main"
        names = write_voc_files(storage.join(job.output, folder), truth, table(), image_set=image_set)
        return [f"{folder}/{name}" for name in names]
    ids = [category["id"] for category in truth["categories"]]
    if truth["annotations"] or max(ids) > _LAST_COCO_ID:
        return []
    name = re.sub(r"[^A-Za-z0-9-]+", "-", job.name) + ("-multiscale" if job.mode == "multiscale" else "")
    folder = f"submission/{job.mode}"
    path = write_submission(storage.join(job.output, folder), name, table(), image_ids=job.image_ids)
    return [f"{folder}/{path.rpartition('/')[2]}"]
