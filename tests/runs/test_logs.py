"""Logs of libraries reach the run's files, not the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from refinedet.pipeline.runs.settings import inherited


def test_deepspeed_prints_no_warning_where_a_launcher_has_no_gpu(tmp_path: Path) -> None:
    code = (
        "from refinedet.pipeline.runs.logs import log_to_file; "
        f"log_to_file({str(tmp_path / 'launch.log')!r}, who='driver'); import deepspeed"
    )
    environment = inherited(CUDA_VISIBLE_DEVICES="")
    environment.pop("DS_ACCELERATOR", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == ""
