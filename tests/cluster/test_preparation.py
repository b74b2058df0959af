"""Shards written by tasks all over a cluster: the same bytes as by one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ray
from refinedet.pipeline.cluster import preparation_stage
from refinedet.pipeline.cluster.mailbox import Mailbox
from refinedet.pipeline.cluster.preparation_stage import run_preparation
from refinedet.pipeline.cluster.shard_tasks import write_in_tasks
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec, Split
from refinedet.pipeline.data.annotations import Annotation, Annotations, Record
from refinedet.pipeline.data.shard_file import ShardWork, write_shard
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.drills.bench import SPEC, Bench
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError

from tests.cluster.commands import run_commands

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("connected")]
PER_SHARD = 5


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def make_works(run: Run, folder: Path, shards: int, load: Callable[[bytes], bytes] | None = None) -> list[ShardWork]:
    """Works of drawn images; `load` passes an image on, or does something about it, where the image is read."""
    records = [
        Record(number, f"{number}.jpg", partial(load or bytes, photo(number)), 1000, annotations_of(number), 32, 24)
        for number in range(shards * PER_SHARD)
    ]
    cut = [records[start : start + PER_SHARD] for start in range(0, len(records), PER_SHARD)]
    return [
        ShardWork(run.spec.data, str(folder), number, number * PER_SHARD, group, "request")
        for number, group in enumerate(cut)
    ]


def annotations_of(number: int) -> Annotations:
    return Annotations([Annotation(number + 1, 1, (1.0, 2.0, 10.0, 5.0), 50.0)])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    data = {**SPEC["data"], "train": [{"count": 40}], "val": [{"count": 9}], "shard_bytes": 20_000}
    cluster = {**SPEC["cluster"], "max_failures": 1}
    spec = {**SPEC, "name": "job", "runs": str(tmp_path / "runs"), "data": data, "cluster": cluster}
    return Run(JobSpec.model_validate(spec))


@pytest.fixture
def second_node(bench: Bench) -> Iterator[None]:
    node = bench.cluster.add_node(num_cpus=2)
    yield
    bench.cluster.remove_node(node)


def test_a_cluster_writes_what_one_process_writes(run: Run, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    with Mailbox() as mailbox:
        found = run_preparation(run, ["train", "val"], mailbox=mailbox, on_progress=lambda *at: done.append(at))
    for part in ("train", "val"):
        alone = prepare_shards(run.spec.data, part, str(tmp_path / "alone" / part))
        assert files_of(Path(run.shards) / part) == files_of(tmp_path / "alone" / part)
        assert len(alone) > 2
        assert found[part] == {"digest": alone.digest, "num_samples": alone.num_samples}
    assert done[-1] == (49, 49)


@pytest.mark.slow
def test_the_command_writes_what_the_stage_writes(run: Run, bench: Bench, tmp_path: Path) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(run.spec.model_dump_json())  # JSON is YAML
    launch = ["launch", str(spec), "--stages", "prepare", "--address", bench.cluster.address]
    results = run_commands([launch, ["shard", str(spec), f"data.shards={tmp_path}/alone"]], cwd=tmp_path)
    assert [result.status for result in results] == [0, 0], "".join(result.stderr for result in results)
    for part in ("train", "val"):
        assert files_of(Path(run.shards) / part) == files_of(tmp_path / "alone" / part)


def test_tasks_run_on_every_node_and_a_bounded_number_at_a_time(run: Run, second_node: None, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()

    def load(content: bytes) -> bytes:
        place = f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"
        with open(notes / f"{time.time_ns()}-{os.getpid()}", "w") as file:
            file.write(place)
        time.sleep(0.1)
        return content

    works = make_works(run, tmp_path / "shards", 16, load)
    seen: list[int] = []
    with closing(write_in_tasks(works, max_failures=0)) as written:
        for shard in written:
            seen.append(shard.number)
            begun = {path.name for path in (tmp_path / "shards").glob("*.npz")}
            assert len(begun) <= len(seen) + 4  # CPUs of both nodes
    assert sorted(seen) == list(range(16))
    places = {path.read_text() for path in notes.iterdir()}
    assert len({place.split()[0] for place in places}) == 2
    alone = tmp_path / "alone"
    for work in make_works(run, alone, 16):
        write_shard(work)
    assert files_of(tmp_path / "shards") == files_of(alone)


@pytest.mark.slow
def test_a_task_that_dies_is_run_again_and_one_that_dies_again_and_again_is_an_error(run: Run, tmp_path: Path) -> None:
    died = tmp_path / "died"

    def die_once(content: bytes) -> bytes:
        if not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return content

    def die(content: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return content

    shards = sorted(write_in_tasks(make_works(run, tmp_path / "shards", 3, die_once), max_failures=1))
    assert died.exists()
    assert shards == [write_shard(work) for work in make_works(run, tmp_path / "alone", 3)]
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "alone")
    with pytest.raises(JobError, match=r"shard \d could not be written.*died again and again"):
        list(write_in_tasks(make_works(run, tmp_path / "other", 3, die), max_failures=1))


def test_the_task_of_a_part_that_dies_is_one_sentence() -> None:
    @ray.remote(max_retries=0)
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    said = r"the shards of train could not be written.*died again and again \(WorkerCrashed"
    with pytest.raises(JobError, match=said):
        preparation_stage._result(die.remote(), "train")


def test_faults_of_images_come_from_the_tasks(run: Run, tmp_path: Path) -> None:
    def cut(content: bytes) -> bytes:
        return content[: len(content) // 2]

    works = make_works(run, tmp_path / "shards", 3)
    works[1] = works[1]._replace(records=[replace(record, load=partial(cut, photo(0))) for record in works[1].records])
    shards = sorted(write_in_tasks(works, max_failures=0))
    assert [len(shard.faults) for shard in shards] == [0, PER_SHARD, 0]
    assert shards[1].line["num_samples"] == 0


@pytest.mark.slow
def test_a_stop_ends_the_tasks_and_the_next_run_writes_the_rest(run: Run, tmp_path: Path) -> None:
    data = run.spec.data.model_copy(update={"train": (Split(count=400),), "val": ()})
    run = Run(run.spec.model_copy(update={"data": data}))
    done: list[int] = []
    with Mailbox() as mailbox:
        prepare = partial(run_preparation, run, ["train"], mailbox=mailbox, on_progress=lambda at, of: done.append(at))
        with pytest.raises(StoppedError, match="run the same command again"):
            prepare(stop_requested=lambda: any(done))
        folder = Path(run.shards) / "train"
        time.sleep(1)  # for the tasks that are ended
        left = files_of(folder)
        time.sleep(1)
        assert files_of(folder) == left
        assert not (folder / "index.json").exists()
        prepare()
    prepare_shards(run.spec.data, "train", str(tmp_path / "alone"))
    assert files_of(folder) == files_of(tmp_path / "alone")


def test_a_mistake_of_the_user_ends_the_stage_with_its_sentence(run: Run, tmp_path: Path) -> None:
    def refuse(content: bytes) -> Any:
        raise UserError("the photo is not yours")

    with pytest.raises(UserError, match="the photo is not yours"):
        list(write_in_tasks(make_works(run, tmp_path / "shards", 3, refuse), max_failures=1))
