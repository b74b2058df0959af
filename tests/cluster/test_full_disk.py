"""A disk that is full in the middle of training, for a while or for good: a real one, of the run alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from refinedet.pipeline.drills.bench import STEPS, Bench

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(1800)]

SIZE_MIB = 1400  # the preflight requires 1 GiB
INTERVAL = 4


@pytest.fixture
def small(bench: Bench, tmp_path: Path) -> Iterator[Bench]:
    """A bench whose runs are on a file system of their own, which is in memory."""
    runs = tmp_path / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(runs)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    small = Bench(tmp_path, _cluster=bench.cluster)
    try:
        yield small
    finally:
        small.end_jobs()
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


def fill(bench: Bench) -> Path:
    """Take all that is free on the disk of the runs, to which the job writes meanwhile."""
    filler = bench.folder / "runs" / "filler"
    with open(filler, "wb") as file:
        while free := shutil.disk_usage(bench.folder / "runs").free:
            with suppress(OSError):  # the job was faster
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free)
    return filler


def test_a_disk_that_is_full_for_a_while_costs_no_step(small: Bench) -> None:
    job = small.launch(small.write_spec("full", training={"checkpoint_every_steps": INTERVAL}))
    assert small.wait_for(job, lambda: small.commits("full")), job.text
    filler = fill(small)
    assert small.wait_for(job, lambda: "training waits" in job.text), job.text
    filler.unlink()
    assert job.wait() == 0, job.text
    assert small.steps("full") == list(range(1, STEPS + 1)), "each once, none of them lost"
    assert small.commits("full")[-1] == STEPS
    assert small.weights("full")
    said = " ".join(job.text.split())
    assert "No space left on device" in said
    assert "Logging error" not in said
    assert re.search(r"training waits \d+ s and saves again, for \d+ s at most", said), said


def test_a_disk_that_stays_full_ends_the_job_with_its_weights_elsewhere(small: Bench) -> None:
    training = {"checkpoint_every_steps": INTERVAL, "save_wait_s": 15}
    job = small.launch(small.write_spec("full", training=training))
    assert small.wait_for(job, lambda: small.commits("full")), job.text
    fill(small)
    assert job.wait() == 1, job.text
    said = "".join(job.text.split())
    found = re.search(r"(/tmp/refinedet-[^/\s]+/weights\.safetensors)", said)
    assert found, job.text
    assert job.text.count("Traceback") == 0, job.text
    assert len(small.events("full", "restarted")) == 0, "a restart would meet the same disk"
    weights = Path(found[1])
    assert weights.stat().st_size > 2**20
    shutil.rmtree(weights.parent)
    assert (small.folder / "runs" / "full" / "checkpoints").is_dir()
