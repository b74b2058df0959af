"""Seconds until the answer to a mistake: every mistake of tests/cli/mistakes.py as a process of its own.

    python -m tests.bench.bench_mistakes [--quick] [--json OUT]

Wall seconds, and processor seconds, which other work on the machine changes less. Limit: 2 s on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from refinedet.model import RefineDet, RefineDetConfig

from tests.cli.mistakes import MISTAKES, write_files

LIMIT_S = 2.0


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(arguments: list[str], folder: Path) -> dict[str, object]:
    before, began = processor_seconds(), time.monotonic()
    command = [sys.executable, "-m", "refinedet.pipeline.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall, processor = time.monotonic() - began, processor_seconds() - before
    return {"mistake": " ".join(arguments), "status": done.returncode, "wall_s": wall, "processor_s": processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every eighth mistake")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_files(folder)
        model = RefineDet(RefineDetConfig(num_classes=2, input_size=64, backbone="resnet18", tcb_channels=8))
        model.save_pretrained(folder / "whole")
        measure(["--version"], folder)  # what is read for the first time comes from the disk
        rows = [measure(arguments, folder) for arguments, _ in MISTAKES[:: 8 if options.quick else 1]]
    for name in ("wall_s", "processor_s"):
        values = sorted(float(str(row[name])) for row in rows)
        over = sum(value > LIMIT_S for value in values)
        print(f"{name:<12} median {statistics.median(values):.2f}  worst {values[-1]:.2f}  over {LIMIT_S:g} s: {over}")  # noqa: T201
    for row in sorted(rows, key=lambda row: -float(str(row["processor_s"])))[:12]:
        print(f"  {row['wall_s']:.2f} s wall  {row['processor_s']:.2f} s processor  {row['mistake']}")  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
