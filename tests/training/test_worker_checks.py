"""Findings of the preflight: on one worker, on two, and in facts that no test machine can give."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.worker_checks import (
    PreflightReport,
    WorkerFacts,
    check_workers,
    judge_clocks,
    judge_memory,
    judge_storage,
    judge_versions,
)
from refinedet.pipeline.training.world import World

from tests.training.workers import run_together

GIB = 2**30
FACTS = WorkerFacts(
    rank=0,
    host="a",
    versions={"python": "3.11.7", "torch": "2.15.0"},
    clock=1000.0,
    device="cuda",
    total_bytes=80 * GIB,
    free_bytes=79 * GIB,
    free_disk_bytes=50 * GIB,
)


def everyone(**of_rank_1: Any) -> list[WorkerFacts]:
    return [FACTS, replace(FACTS, rank=1, host="b", **of_rank_1)]


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Three shards of three bytes each, which is all that a digest needs."""
    contents = [b"one", b"two", b"six"]
    for number, content in enumerate(contents):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / f"{number}.tar").write_bytes(content)
    table = {
        "names": [f"{number}.tar" for number in range(3)],
        "bytes": [3] * 3,
        "sha256": [storage.digest_bytes(content) for content in contents],
        "contents_sha256": [""] * 3,
        "num_samples": [1] * 3,
    }
    index = {"format": "shapes", "part": "train", "digest": "d", "categories": [], "shards": table}
    return ShardSet(str(tmp_path / "shards"), index)


def finding(report: PreflightReport, name: str) -> Any:
    return next(each for each in report.findings if each.name == name)


def test_one_worker_in_order(world: World, tmp_path: Path, shards: ShardSet) -> None:
    report = check_workers(world, str(tmp_path / "run"), shards, memory_bytes=1e6)
    report.raise_faults()
    names = ["workers", "storage", "shards", "memory", "versions", "clocks", "all-reduce"]
    assert [each.name for each in report.findings] == names
    assert "2 of 3 read whole" in finding(report, "shards").text
    assert f"torch {torch.__version__}".split("+")[0] in finding(report, "versions").text
    assert list((tmp_path / "run").iterdir()) == [], "it leaves nothing behind"
    assert report.seconds < 30


def test_shards_may_be_still_to_be_written(world: World, tmp_path: Path) -> None:
    report = check_workers(world, str(tmp_path), None)
    report.raise_faults()
    assert "not written yet" in finding(report, "shards").text


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lambda path: path.write_bytes(b"oNe"), "does not match its digest"), (Path.unlink, "cannot be read")],
)
def test_a_damaged_shard_is_named_with_the_remedy(
    world: World, tmp_path: Path, shards: ShardSet, damage: Any, said: str
) -> None:
    for path in (tmp_path / "shards").iterdir():
        damage(path)
    report = check_workers(world, str(tmp_path / "run"), shards)
    with pytest.raises(UserError, match=rf"rank 0 on .*\.tar {said}.*refinedet shard"):
        report.raise_faults()


def test_a_folder_that_cannot_be_written_is_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = check_workers(world, str(tmp_path / "file" / "run"), None)
    with pytest.raises(UserError, match=r"rank 0 on .* the run's directory .*/file/run cannot be written \(Not a dir"):
        report.raise_faults()


def test_storage_that_gives_back_other_bytes_is_named(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda path: bytes(byte ^ 1 for byte in read(path)))
    (fault,) = check_workers(world, str(tmp_path), None).faults
    assert "gives back other bytes" in fault


def test_a_full_disk_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
    (fault,) = check_workers(world, str(tmp_path / "not" / "there"), None).faults
    assert "has 5 MiB left; make room" in fault


@pytest.mark.dist
def test_two_workers_agree_on_what_one_of_them_found(tmp_path: Path) -> None:
    """Rank 1 sees a directory of its own under the run's name, as where a run is not on shared storage."""
    reports = run_together(_preflight_of_two, tmp_path, str(tmp_path))
    assert reports[0] == reports[1]
    (fault,) = reports[0]["faults"]
    assert "rank 1 on" in fault
    assert "is not the one that rank 0 writes to" in fault
    assert reports[0]["reduce_gb_s"] > 0


def _preflight_of_two(world: World, folder: str) -> dict[str, Any]:
    report = check_workers(world, f"{folder}/run" if world.rank == 0 else f"{folder}/elsewhere", None)
    return {"faults": report.faults, "reduce_gb_s": report.reduce_gb_s}


# --- facts that no test machine can give


def test_other_versions_are_named_with_both_nodes() -> None:
    found = judge_versions([("a", {"python": "3.11.7", "torch": "2.15.0"}), ("b", {"python": "3.11.7"})])
    assert found.faults == ("torch is 2.15.0 on a, but missing on b; install the same everywhere",)
    found = judge_versions([("a", {"torch": "2.15.0"}), ("b", {"torch": "2.14.0"}), ("c", {"torch": "2.15.0"})])
    assert found.faults == ("torch is 2.15.0 on a, but 2.14.0 on b; install the same everywhere",)
    assert judge_versions([("a", {"torch": "2"}), ("b", {"torch": "2"})]).faults == ()


def test_clocks_that_differ_are_a_fault() -> None:
    assert judge_clocks([1000.0, 1004.0]).faults == ()
    (fault,) = judge_clocks([1000.0, 991.0]).faults
    assert "differ by 9.0 s" in fault


def test_memory_is_held_against_the_device() -> None:
    assert judge_memory(everyone(), 78 * GIB).faults == ()
    first, second = judge_memory(everyone(), 81 * GIB).faults
    assert "rank 0 on a: the job needs about 81.0 GiB on a device of 80.0 GiB" in first
    assert "model.activation_checkpointing" in second
    (fault,) = judge_memory(everyone(free_bytes=20 * GIB), 40 * GIB).faults
    assert "rank 1 on b" in fault
    assert "another process leaves 20.0 of 80.0 GiB on the device" in fault
    assert judge_memory(everyone(), None).faults == ()


def test_workers_on_one_machine_share_its_memory() -> None:
    on_cpu = [replace(facts, device="cpu", host="a") for facts in everyone()]
    assert judge_memory(on_cpu, 39 * GIB).faults == ()
    assert len(judge_memory(on_cpu, 41 * GIB).faults) == 2
    assert judge_memory([replace(facts, device="cpu") for facts in everyone()], 41 * GIB).faults == ()


def test_the_disk_that_is_fullest_is_named() -> None:
    (fault,) = judge_storage(everyone(free_disk_bytes=2**20), "/runs/r").faults
    assert "rank 1 on b" in fault
