"""`refinedet predict` as a process of its own: seconds and memory for few, many and more photos, and for a video.

    python -m tests.bench.bench_predict WEIGHTS PHOTOS [--few 8] [--many 200] [--all] [--turns 3] [--json OUT]

WEIGHTS is a run's directory, PHOTOS a directory. An image costs what `many` take beyond `few`, by their number; the
rest is the start of the process. --all adds one pass over every photo, --video one over a drawn video of 300 frames.
--earlier 'COMMAND' runs another program in turns with it; {photos} and {output} in it stand for files and a directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.bench.record import describe_where, save_result

FRAMES, FRAME_WIDTH, FRAME_HEIGHT = 300, 640, 480
COLUMNS = ["what", "images", "whole command, s", "ms per image", "images/s", "peak memory, MB"]


@dataclass(frozen=True)
class Ran:
    seconds: float
    peak_mb: float


def run(command: Sequence[str]) -> Ran:
    """Run a command to its end; its own memory at its highest."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    assert process.stderr is not None
    assert os.waitstatus_to_exitcode(status) == 0, process.stderr.read().decode()[-2000:]
    return Ran(seconds, used.ru_maxrss / 1000)


def ours(weights: str, sources: Sequence[str], output: Path) -> list[str]:
    return [sys.executable, "-m", "refinedet.pipeline.cli", "predict", weights, *sources, "--output", str(output)]


def earlier(command: str, sources: Sequence[str], output: Path) -> list[str]:
    return ["bash", "-c", command.format(photos=shlex.join(sources), output=shlex.quote(str(output)))]


def draw_video(path: Path) -> None:
    """Discs that move over noise."""
    generator = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, (FRAME_WIDTH, FRAME_HEIGHT))
    assert writer.isOpened()
    background = generator.integers(0, 120, (FRAME_HEIGHT // 8, FRAME_WIDTH // 8, 3), np.uint8)
    background = cv2.resize(background, (FRAME_WIDTH, FRAME_HEIGHT), interpolation=cv2.INTER_NEAREST)
    for number in range(FRAMES):
        frame = background.copy()
        for disc in range(3):
            place = (40 + (2 * number + 200 * disc) % (FRAME_WIDTH - 80), 100 + 130 * disc)
            cv2.circle(frame, place, 40, (60 + 60 * disc, 200, 90 * disc), -1)
        writer.write(frame)
    writer.release()


def rows_of(name: str, ran: dict[int, list[Ran]]) -> list[list[Any]]:
    """A row for each number of images; the cost of an image is of the larger number beyond the smallest."""
    few = min(ran)
    start_s = statistics.median(one.seconds for one in ran[few])
    rows = []
    for count, found in sorted(ran.items()):
        seconds = statistics.median(one.seconds for one in found)
        spread = sorted(one.seconds for one in found)
        each_s = (seconds - start_s) / (count - few) if count > few else None
        rows.append(
            [
                name,
                count,
                f"{seconds:.1f}" + (f" ({spread[0]:.1f} - {spread[-1]:.1f})" if len(found) > 1 else ""),
                "" if each_s is None else f"{1000 * each_s:.1f}",
                "" if each_s is None else f"{1 / each_s:.1f}",
                f"{max(one.peak_mb for one in found):.0f}",
            ]
        )
    return rows


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[int, list[Ran]]]:
    photos = sorted(str(path) for path in Path(options.photos).glob("*.jpg"))
    counts = [options.few, min(options.many, len(photos))]
    found: dict[str, dict[int, list[Ran]]] = {"predict": {count: [] for count in counts}}
    if options.earlier:
        found["earlier"] = {count: [] for count in counts}
    for _ in range(options.turns):
        for count in counts:
            found["predict"][count].append(run(ours(options.weights, photos[:count], folder / "found")))
            if options.earlier:
                found["earlier"][count].append(run(earlier(options.earlier, photos[:count], folder / "earlier")))
    if options.all:
        found["predict"][len(photos)] = [run(ours(options.weights, [options.photos], folder / "all"))]
    if options.video:
        draw_video(folder / "discs.mp4")
        ran = run(ours(options.weights, [str(folder / "discs.mp4")], folder / "video"))
        read = cv2.VideoCapture(str(folder / "video" / "discs.mp4"))
        assert int(read.get(cv2.CAP_PROP_FRAME_COUNT)) == FRAMES
        found["video"] = {options.few: found["predict"][options.few], FRAMES: [ran]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("photos")
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--earlier", metavar="COMMAND")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    rows = [
        row for name, ran in found.items() for row in rows_of(name, ran) if (name, row[1]) != ("video", options.few)
    ]
    print(json.dumps(rows, indent=1))  # noqa: T201
    if options.json:
        # The names of this machine's directories mean nothing elsewhere.
        names = {options.weights: "WEIGHTS", options.photos: "PHOTOS", options.earlier: "COMMAND"}
        sys.argv[1:] = [names.get(word, word) for word in sys.argv[1:]]
        save_result(
            options.json,
            COLUMNS,
            rows,
            describe_where(("timm", "opencv-python-headless")),
            workload="Pictures and JSON lines, as without options. An image costs what a row takes beyond the fewest.",
            spread="lowest and highest of the turns, in brackets",
            figures={
                name: {count: [vars(one) for one in found] for count, found in ran.items()}
                for name, ran in found.items()
            },
        )


if __name__ == "__main__":
    main()
