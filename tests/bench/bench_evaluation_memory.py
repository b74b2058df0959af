"""Memory of the driver of an evaluation: what the end of the stage takes once all chunks are committed.

    python -m tests.bench.bench_evaluation_memory [--images 20000] [--categories 1203] [--detections 300] [--json OUT]

Chunks are committed and matched in a process of their own, as by a worker. The driver receives the answers, pickled as
Ray would send them, computes the numbers and writes the results file. Its memory is the peak of its resident set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from refinedet.model import RefineDetConfig
from refinedet.pipeline.evaluation.chunks import Chunk, ChunkResult, split_into_chunks, write_chunk
from refinedet.pipeline.evaluation.detection_job import OWN_METHOD, DetectionJob
from refinedet.pipeline.evaluation.detection_results import conclude
from refinedet.pipeline.evaluation.detection_worker import ChunkAnswer
from refinedet.pipeline.evaluation.diagnosis_examination import can_examine, examine
from refinedet.pipeline.evaluation.metrics import make_protocol, match_detections
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

_OBJECTS = 12  # of an image, as LVIS's


def write_truth(path: Path, images: int, categories: int, *, federated: bool) -> None:
    """Random boxes, in LVIS's format or COCO's."""
    rng = np.random.default_rng(0)
    count = _OBJECTS * images
    boxes = np.concatenate([rng.uniform(0, 500, (count, 2)), rng.uniform(8, 200, (count, 2))], 1).round(2)
    labels = rng.integers(1, categories + 1, count).tolist()
    owners = np.repeat(np.arange(1, images + 1), _OBJECTS).tolist()
    annotations = [
        {"id": n + 1, "image_id": owners[n], "category_id": labels[n], "bbox": box, "area": box[2] * box[3]}
        for n, box in enumerate(boxes.tolist())
    ]
    listed: list[dict[str, Any]] = [
        {"id": n, "width": 640, "height": 480, "file_name": f"{n}.jpg"} for n in range(1, images + 1)
    ]
    if federated:
        for image in listed:
            absent = rng.choice(categories, 20, replace=False) + 1
            own = labels[_OBJECTS * (image["id"] - 1) : _OBJECTS * image["id"]]
            image["neg_category_ids"] = np.setdiff1d(absent, own).tolist()
    names = [{"id": n, "name": f"class {n}", "frequency": "rcf"[n % 3]} for n in range(1, categories + 1)]
    path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": names}))


def draw_detections(truth: GroundTruth, chunk: Chunk, detections: int) -> DetectionTable:
    """Half of them near objects of their image, best first."""
    rng = np.random.default_rng(chunk.index)
    ids = truth.image_ids[chunk.start : chunk.stop]
    source = np.searchsorted(truth.image_id, ids)[:, None] + rng.integers(0, _OBJECTS, (len(ids), detections))
    near = rng.random((len(ids), detections)) < 0.5
    boxes = truth.bbox[source] * rng.uniform(0.9, 1.1, (len(ids), detections, 4))
    labels = np.where(near, truth.category_id[source], rng.choice(truth.category_ids, source.shape))
    scores = -np.sort(-rng.random(source.shape), axis=1)
    return DetectionTable(
        np.repeat(ids, detections), labels.ravel(), boxes.reshape(-1, 4).round(3), scores.ravel().round(8)
    )


def work(job: DetectionJob, chunks: tuple[Chunk, ...], detections: int, answers: Path) -> None:
    """Commit every chunk, and leave the answer that a worker would return."""
    truth = GroundTruth.of(job.truth)
    for chunk in chunks:
        table = draw_detections(truth, chunk, detections)
        write_chunk(job.folder, chunk, ChunkResult(table), fingerprint=job.fingerprint)
        ids = job.image_ids[chunk.start : chunk.stop]
        matches = {OWN_METHOD: match_detections(job.protocol, truth, table, ids)}
        examined = examine(truth, table, ids) if can_examine(truth) else None
        (answers / chunk.name).write_bytes(pickle.dumps(ChunkAnswer(matches, examined=examined)))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Peak of this process's memory before and after the end of a stage, bytes, and the seconds that it takes."""
    truth_file, answers = folder / "truth.json", folder / "answers"
    answers.mkdir()
    job = DetectionJob(
        mode="single",
        name="bench",
        weights="",
        shards="",
        truth=str(truth_file),
        output=str(folder),
        image_ids=tuple(range(1, args.images + 1)),
        fingerprint="bench",
        protocol=make_protocol(args.metric),
        merge_rules={},
        format="bench",
        image_set="",
    )
    chunks = split_into_chunks(args.images, 256, 8)
    context = multiprocessing.get_context("spawn")
    for target, values in (
        (_write_truth_of, (truth_file, args.images, args.categories, args.metric == "lvis")),
        (work, (job, chunks, args.detections, answers)),
    ):
        process = context.Process(target=target, args=values)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
    before = peak_memory()
    began = time.monotonic()
    truth = GroundTruth.of(job.truth)
    received = {chunk: pickle.loads((answers / chunk.name).read_bytes()) for chunk in chunks}
    found = conclude(job, RefineDetConfig(), truth, received, ())
    return {
        "detections": found.num_detections,
        "bytes_before": before,
        "bytes_peak": peak_memory(),
        "seconds": time.monotonic() - began,
        "file_bytes": Path(job.detections).stat().st_size,
    }


def _write_truth_of(path: Path, images: int, categories: int, federated: bool) -> None:
    write_truth(path, images, categories, federated=federated)


def peak_memory() -> int:
    """Largest resident set of this process until now, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--categories", type=int, default=1203)
    parser.add_argument("--metric", choices=("lvis", "coco"), default="lvis")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if args.quick:
        args.images, args.categories, args.detections = 300, 40, 50
    with tempfile.TemporaryDirectory(prefix="refinedet-bench-") as folder:
        report = measure(Path(folder), args)
    sys.stdout.write(
        f"{args.images} images x {args.detections} detections, {args.categories} categories, {args.metric}: driver "
        f"{report['bytes_peak'] / 1e9:.2f} GB at most ({report['bytes_before'] / 1e9:.2f} GB before), "
        f"{report['seconds']:.0f} s, results file {report['file_bytes'] / 1e9:.2f} GB\n"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), **report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
