"""COCO evaluation beside pycocotools and faster-coco-eval, in one run, on random detections from a seed.

    python tests/bench/bench_evaluation.py [--images 5000] [--repeats 3] [--json OUT]

Beside OUT, evaluation_workers.json is written.

Every evaluator starts from the same Python objects (an instances dict and a list of rows) and ends with the twelve
numbers; pycocotools runs once, as it takes a minute. Times are CPU time of all threads, so that a busy machine counts
less. Workers are processes that hold their images' detections: for them it is the CPU time of the longest matching, and
the wall clock of reading the matches and accumulating in the driver, as long as the whole takes where each has a core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "evaluation")]

from random_truth import random_truth  # noqa: E402
from refinedet.pipeline.evaluation.metrics import (  # noqa: E402
    accumulate_matches,
    evaluate,
    make_protocol,
    match_detections,
)
from refinedet.pipeline.evaluation.truth import GroundTruth  # noqa: E402
from refinedet.pipeline.inference.detections import DetectionTable  # noqa: E402

from tests.bench.record import describe_where, save_result  # noqa: E402
from tests.evaluation.judges import judge_by_faster_coco_eval, judge_by_pycocotools  # noqa: E402

COCO = make_protocol("coco")


def measure(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = run()
        seconds.append(time.process_time() - start)
    return seconds, result


def work(truth: GroundTruth, table: DetectionTable, images: np.ndarray, results) -> None:
    start = time.process_time()
    content = pickle.dumps(match_detections(COCO, truth, table, images.tolist()))
    results.put((time.process_time() - start, content))


def evaluate_by_workers(
    truth: GroundTruth, table: DetectionTable, workers: int
) -> tuple[float, float, int, dict[str, float]]:
    """Seconds of the slowest worker's matching, seconds of accumulating, bytes that travelled, the twelve numbers."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = []
    for worker in range(workers):
        images = truth.image_ids[worker::workers]
        own = table.select(np.isin(table.image_id, images))
        processes.append(context.Process(target=work, args=(truth, own, images, results)))
        processes[-1].start()
    answers = [results.get() for _ in processes]
    for process in processes:
        process.join()
    start = time.perf_counter()
    metrics = accumulate_matches(COCO, truth, [pickle.loads(content) for _, content in answers])
    seconds = time.perf_counter() - start
    return max(answer[0] for answer in answers), seconds, sum(len(answer[1]) for answer in answers), metrics.values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--categories", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    truth, rows = random_truth(
        0, images=args.images, categories=args.categories, objects=7, detections=args.detections, ties=False
    )
    known, table = GroundTruth.of(truth), DetectionTable.of(rows)  # now: pycocotools writes into its inputs
    times: dict[str, list[float]] = {}
    values: dict[str, dict[str, float]] = {}
    runs: tuple[tuple[str, Callable[[], dict[str, float]], int], ...] = (
        ("ours", lambda: evaluate(COCO, truth, rows).values, args.repeats),
        ("faster-coco-eval", lambda: judge_by_faster_coco_eval(truth, rows, keep=False), args.repeats),
        ("pycocotools", lambda: judge_by_pycocotools(truth, rows, keep=False), 1),
    )
    for name, run, repeats in runs:
        times[name], values[name] = measure(run, repeats)
    base = statistics.median(times["pycocotools"])
    workload = f"{args.images:,} images x {args.detections} detections, {args.categories} categories, CPU seconds."
    evaluators, by_workers = [], []
    sys.stdout.write(f"{workload}\n")
    sys.stdout.write(f"{'evaluator':20}{'median s':>10}{'spread s':>10}{'/ pycocotools':>15}  twelve numbers\n")
    for name, seconds in times.items():
        median, spread = statistics.median(seconds), max(seconds) - min(seconds)
        worst = max(abs(values[name][key] - values["pycocotools"][key]) for key in values[name])
        same = "equal to the last digit" if worst == 0 else f"differ by {worst:.1e}"
        sys.stdout.write(f"{name:20}{median:10.2f}{spread:10.2f}{median / base:15.3f}  {same}\n")
        evaluators.append(
            [name, f"{median:.3g}", f"{spread:.2f}" if len(seconds) > 1 else "", f"{median / base:.3f}", same]
        )
    sys.stdout.write(f"{'':20}{'matching s':>10}{'rest s':>10}{'whole s':>10}{'times':>10}{'MB sent':>10}\n")
    alone = 0.0
    for workers in (1, 2, 3, 5):
        runs_of_workers = [evaluate_by_workers(known, table, workers) for _ in range(args.repeats)]
        matching, rest, sent = (statistics.median(one[column] for one in runs_of_workers) for column in range(3))
        equal = all(one[3] == values["pycocotools"] for one in runs_of_workers)
        whole = matching + rest
        alone = alone or whole
        sys.stdout.write(
            f"{workers:2} worker{'s' if workers > 1 else ' ':11}{matching:10.3f}{rest:10.3f}{whole:10.3f}"
            f"{alone / whole:10.1f}{sent / 1e6:10.1f}"
        )
        sys.stdout.write(f"{'':5}  {'equal to the last digit' if equal else 'DIFFERENT'}\n")
        seconds = [f"{value:.3f}" for value in (matching, rest, whole)]
        by_workers.append(
            [str(workers), *seconds, f"{alone / whole:.1f}", f"{sent / 1e6:.1f}", "yes" if equal else "NO"]
        )
    where = describe_where(["numpy", "pycocotools", "faster-coco-eval"])
    sys.stdout.write(f"{where}\n")
    if args.json:
        columns = ["evaluator", "median s", "spread s", "of pycocotools", "twelve numbers"]
        spread = f"most minus least of {args.repeats} repetitions"
        save_result(args.json, columns, evaluators, where, workload=workload, spread=spread)
        columns = ["workers", "matching s", "the rest s", "whole s", "times faster", "MB sent", "equal numbers"]
        beside = Path(args.json).with_name("evaluation_workers.json")
        save_result(beside, columns, by_workers, where, workload=workload, spread=None)


if __name__ == "__main__":
    main()
