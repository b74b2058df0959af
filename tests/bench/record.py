"""Results of benchmarks, as --json writes them and tests.bench.tables reads them, with place and way of measuring."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def describe_where(packages: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """commit, hardware and versions of this process."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    hardware = f"{os.cpu_count()} cores of {_processor()} ({torch.backends.cpu.get_cpu_capability()})"
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    else:
        hardware += f", torch on {torch.get_num_threads()}, no GPU used"
    names = dict.fromkeys(("torch", *packages))
    return {
        "commit": commit or None,
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def save_result(
    path: str | Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    where: dict[str, Any],
    *,
    workload: str,
    spread: str | None,
    figures: Any = None,
) -> None:
    """Write a table.

    rows      numbers, rounded as they are to be printed, or text
    where     of `describe_where`
    figures   all that was measured, as the benchmark has it
    """
    result = {
        "command": _command(), "date": f"{datetime.date.today()}", **where, "workload": workload, "spread": spread,
        "columns": list(columns), "rows": [list(row) for row in rows], "figures": figures,
    }  # fmt: skip
    Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _command() -> str:
    """The command line without --json OUT."""
    words, rest = [], iter(sys.argv[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            words.append(word)
    return shlex.join(["python", "-m", f"tests.bench.{Path(sys.argv[0]).stem}", *words])
