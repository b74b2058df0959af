"""Merging boxes beside the classical formulations, in one run, on random boxes from a seed.

    python tests/bench/bench_merge.py [--boxes 500] [--classes 80] [--repeats 9] [--threads N] [--json OUT]

Peers: soft-NMS as the classical loop over rows of (x1, y1, x2, y2, score), compiled here with `g++ -O2`; voting in
NumPy as the authors' test code does it (argsort, delete, stack); NMS by torchvision's batched_nms. Times include the
Python call and the grouping by class; the peers get their boxes sorted into classes already. They are CPU time of all
threads, so that a busy machine counts less.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import batched_nms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from refinedet.model.ops import library, merge  # noqa: E402

from tests.bench.record import describe_where, save_result  # noqa: E402

CLASSICAL = r"""
#include <algorithm>
#include <cmath>
extern "C" int soft_nms(float* rows, int count, float iou, float sigma, float threshold, int gaussian) {
  for (int i = 0; i < count; ++i) {
    int best = i;
    for (int j = i + 1; j < count; ++j) if (rows[5 * j + 4] > rows[5 * best + 4]) best = j;
    for (int k = 0; k < 5; ++k) std::swap(rows[5 * i + k], rows[5 * best + k]);
    const float *a = rows + 5 * i;
    for (int j = i + 1; j < count;) {
      float* b = rows + 5 * j;
      const float area = (b[2] - b[0] + 1) * (b[3] - b[1] + 1);
      const float width = std::min(a[2], b[2]) - std::max(a[0], b[0]) + 1;
      if (width > 0) {
        const float height = std::min(a[3], b[3]) - std::max(a[1], b[1]) + 1;
        if (height > 0) {
          const float both = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + area - width * height;
          const float overlap = width * height / both;
          float weight = 1;
          if (gaussian) weight = std::exp(-(overlap * overlap) / sigma);
          else if (overlap > iou) weight = 1 - overlap;
          b[4] *= weight;
          if (b[4] < threshold) {
            --count;
            for (int k = 0; k < 5; ++k) b[k] = rows[5 * count + k];
            continue;
          }
        }
      }
      ++j;
    }
  }
  return count;
}
"""


def compile_classical() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "classical.cpp").write_text(CLASSICAL)
    command = ["g++", "-O2", "-shared", "-fPIC", "-o", str(folder / "classical.so"), str(folder / "classical.cpp")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(folder / "classical.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_float
    loaded.soft_nms.argtypes = [pointer, ctypes.c_int, number, number, number, ctypes.c_int]
    return loaded


def vote_in_numpy(rows: np.ndarray, soft: bool) -> np.ndarray:
    """Box voting as the authors' test code goes about it: one cluster at a time, its rows deleted from the array."""
    rows = rows[rows[:, 4].argsort()[::-1]]
    out = np.zeros((0, 5), np.float32)
    while len(rows):
        area = (rows[:, 2] - rows[:, 0] + 1) * (rows[:, 3] - rows[:, 1] + 1)
        width = np.maximum(0.0, np.minimum(rows[0, 2], rows[:, 2]) - np.maximum(rows[0, 0], rows[:, 0]) + 1)
        height = np.maximum(0.0, np.minimum(rows[0, 3], rows[:, 3]) - np.maximum(rows[0, 1], rows[:, 1]) + 1)
        overlap = width * height / (area[0] + area - width * height)
        near = np.where(overlap >= 0.45)[0]
        voters, overlap = rows[near, :], overlap[near]
        rows = np.delete(rows, near, 0)
        if len(near) <= 1:
            out = np.vstack((out, voters))
            continue
        lowered = voters.copy()
        lowered[:, 4] = lowered[:, 4] * (1 - overlap)
        voters[:, :4] = voters[:, :4] * np.tile(voters[:, -1:], (1, 4))
        merged = np.zeros((1, 5), np.float32)
        merged[:, :4] = voters[:, :4].sum(0) / voters[:, -1:].sum()
        merged[:, 4] = voters[:, 4].max()
        out = np.vstack((out, lowered[lowered[:, 4] >= 0.01], merged)) if soft else np.vstack((out, merged))
    return out[out[:, 4].argsort()[::-1]]


def random_boxes(boxes: int, classes: int, seed: int) -> np.ndarray:
    """[classes, boxes, 5]: a third around a dozen objects, as detectors give them, the others anywhere."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 640, (classes, boxes, 2))
    sides = np.exp(rng.uniform(np.log(16), np.log(320), (classes, boxes, 2)))
    source = rng.integers(0, min(12, boxes), (classes, boxes))
    near = rng.random((classes, boxes)) < 1 / 3
    for values, spread in ((centres, 8.0), (sides, 6.0)):
        objects = np.take_along_axis(values, source[..., None], 1) + rng.normal(0, spread, values.shape)
        values[near] = objects[near]
    sides = np.maximum(sides, 4)
    scores = rng.uniform(0.01, 1, (classes, boxes, 1)) ** 2 + 0.01
    return np.concatenate([centres - sides / 2, centres + sides / 2, scores], 2).astype(np.float32)


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=500, help="of a class")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few boxes, to try the command; times mean nothing")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    if args.quick:
        args.boxes, args.classes, args.repeats = 20, 2, 1
    if not library.is_loaded():
        parser.error(library.describe_library().reason)
    torch.set_num_threads(args.threads)
    rows = random_boxes(args.boxes, args.classes, seed=0)
    flat = torch.from_numpy(rows.reshape(-1, 5))
    boxes, scores = flat[:, :4].contiguous(), flat[:, 4].contiguous()
    groups = torch.arange(args.classes).repeat_interleave(args.boxes)
    classical = compile_classical()

    def soft_nms_classical(gaussian: bool) -> int:
        count = 0
        for one in rows:
            own = one.copy()
            count += classical.soft_nms(own.ctypes.data, len(own), 0.3, 0.5, 0.01, gaussian)
        return count

    def soft_nms(gaussian: bool) -> int:
        return len(merge.soft_nms(boxes, scores, groups, gaussian=gaussian, plus_one=True)[0])

    def vote(soft: bool) -> int:
        return len(merge.vote(boxes, scores, groups, soft=soft, plus_one=True)[1])

    runs: dict[str, Callable[[], Any]] = {
        "soft-NMS linear": lambda: soft_nms(False),
        "soft-NMS linear, classical loop, g++ -O2": lambda: soft_nms_classical(False),
        "soft-NMS Gaussian": lambda: soft_nms(True),
        "soft-NMS Gaussian, classical loop, g++ -O2": lambda: soft_nms_classical(True),
        "vote": lambda: vote(False),
        "vote, NumPy": lambda: sum(len(vote_in_numpy(one, False)) for one in rows),
        "soft vote": lambda: vote(True),
        "soft vote, NumPy": lambda: sum(len(vote_in_numpy(one, True)) for one in rows),
        "NMS": lambda: len(merge.nms(boxes, scores, groups, iou=0.45)),
        "NMS, torchvision batched_nms": lambda: len(batched_nms(boxes, scores, groups, 0.45)),
        "weighted box fusion": lambda: len(merge.weighted_box_fusion(boxes, scores, groups, num_views=2)[1]),
    }
    kept = {name: run() for name, run in runs.items()}
    times = measure(runs, args.repeats)
    where = describe_where(["torchvision", "numpy"])
    where["versions"]["operators"] = " and ".join(library.describe_library().compilers)
    rows, figures = [], {}
    sys.stdout.write(f"{args.boxes} boxes of each of {args.classes} classes, {args.threads} thread(s)\n")
    sys.stdout.write(f"{'':44}{'median ms':>10}{'spread ms':>10}{'boxes left':>12}{'times faster':>14}\n")
    names = list(runs)
    for name in names:
        median, spread = statistics.median(times[name]) * 1e3, (max(times[name]) - min(times[name])) * 1e3
        ours = next((other for other in names if name.startswith(f"{other}, ")), None)
        faster = f"{median / (statistics.median(times[ours]) * 1e3):.1f}" if ours else ""
        sys.stdout.write(f"{name:44}{median:10.2f}{spread:10.2f}{kept[name]:12d}{faster:>14}\n")
        rows.append([name, f"{median:.3g}", f"{spread:.2g}", str(kept[name]), faster])
        figures[name] = {"seconds": times[name], "left": kept[name]}
    sys.stdout.write(f"{where}\n")
    if args.json:
        columns = ["", "median ms", "spread ms", "boxes left", "times slower than ours"]
        workload = f"{args.boxes} boxes of each of {args.classes} classes, CPU milliseconds."
        spread = f"most minus least of {args.repeats} repetitions in turns"
        save_result(args.json, columns, rows, where, workload=workload, spread=spread, figures=figures)


if __name__ == "__main__":
    main()
