"""Each benchmark of the detector runs to its end at small sizes, so that none breaks unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.tables import read_result, render

REPOSITORY = Path(__file__).resolve().parents[2]
WITH_TABLES = {"bench_align_conv", "bench_detector", "bench_merge", "bench_peers", "bench_ranks", "bench_tracking"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bench_align_conv",
        "bench_detector",
        "bench_merge",
        "bench_multiscale",
        "bench_peers",
        "bench_evaluation_memory",
        "bench_shards",
        "bench_ranks",
        "bench_tracking",
    ],
)
def test_a_benchmark_runs_to_its_end(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", f"tests.bench.{name}", "--quick", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "report.json"
    assert render(read_result(report)) if name in WITH_TABLES else json.loads(report.read_text())


def test_the_check_of_a_gpu_ends_at_once_where_there_is_none() -> None:
    """In one sentence, with status 2, and without Ray or DeepSpeed, which a bare machine with a GPU has not."""
    program = (
        "import sys, torch; torch.cuda.is_available = lambda: False; sys.argv = ['check']\n"
        "from tests.gpu import check\n"
        "import tests.gpu.test_align_conv_gpu, tests.gpu.test_detector_gpu\n"
        "status = check.main()\n"
        "assert not {'ray', 'deepspeed', 'mlflow', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "no CUDA device was found, so nothing was checked" in done.stdout
