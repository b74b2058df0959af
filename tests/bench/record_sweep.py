"""Write what a sweep has shown as a result that tests.bench.tables and tests.bench.plots read.

    python -m tests.bench.record_sweep jobs/sweeps/NAME.yaml [runs=RUNS]

writes tests/bench/results/NAME.json: what `refinedet compare` prints, and where the runs were made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refinedet.pipeline.config.sweep_spec import Sweep, load_sweep
from refinedet.pipeline.report.sweep_results import compare_sweep
from refinedet.pipeline.runs.errors import UserError

from tests.bench.tables import RESULTS

PACKAGES = ("python", "torch", "torchvision", "timm", "ray", "deepspeed")
SPREAD = "standard deviation over seeds; of a difference, over the differences at equal seeds"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    try:
        sweep = load_sweep(arguments.sweep, arguments.overrides)
        found = compare_sweep(sweep).as_json()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    result = {"command": f"refinedet sweep {arguments.sweep}", **where(sweep), "spread": SPREAD, "sweep": found}
    path = RESULTS / f"{sweep.spec.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{path}\n")
    return 0


def where(sweep: Sweep) -> dict[str, Any]:
    """commit, date, hardware and versions of the runs that were evaluated, all of them where they differ."""
    folders = [Path(sweep.directory) / run.spec.name for run in sweep.runs]
    done = [folder for folder in folders if (folder / "metrics.json").exists()]
    read = [json.loads((folder / "environment.json").read_text()) for folder in done]
    last = max(os.path.getmtime(folder / "metrics.json") for folder in done)
    return {
        "commit": joined(one["commit"] for one in read),
        "date": f"{datetime.date.fromtimestamp(last)}",
        "hardware": joined(describe(one) for one in read),
        "versions": {name: joined(one["versions"][name] for one in read) for name in PACKAGES},
    }


def describe(environment: dict[str, Any]) -> str:
    devices = joined(str(device) for device in environment["devices"]) or "no GPU"
    memory = environment["memory_bytes"] / 1e9
    return f"{environment['cores']} cores of {environment['processor']}, {memory:.0f} GB, {devices}"


def joined(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


if __name__ == "__main__":
    sys.exit(main())
