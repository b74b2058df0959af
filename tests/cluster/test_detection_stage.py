"""How pieces are handed to workers that come and go; Ray is played."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from refinedet.pipeline.cluster import detection_stage
from refinedet.pipeline.cluster.detection_job import DetectionJob
from refinedet.pipeline.cluster.detection_pool import DetectionPool
from refinedet.pipeline.cluster.detection_stage import _work_through
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.evaluation.chunks import split_into_chunks
from refinedet.pipeline.runs.errors import JobError


class PlayedRay:
    """Workers by number of start; `begins` says which come up, `dies` which die with their first piece in hand."""

    def __init__(self, begins: set[int], dies: set[int]) -> None:
        self.begins, self.dies, self.started = begins, dies, 0

    def take(self) -> Any:
        worker, self.started = self.started, self.started + 1
        return SimpleNamespace(
            begin=SimpleNamespace(remote=lambda job, truth, number: (worker, None)),
            work=SimpleNamespace(remote=lambda piece: (worker, piece)),
        )

    def keep(self, workers: Iterable[Any]) -> None:
        list(workers)

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        time.sleep(0.01)
        return [ref for ref in refs if ref[0] in self.begins][:1], []

    def get(self, ref: Any) -> Any:
        worker, piece = ref
        if piece is not None and worker in self.dies:
            raise RayActorError
        return f"answer of worker {worker}"

    def kill(self, worker: Any) -> None:
        pass


def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: PlayedRay) -> list[tuple[int, str]]:
    monkeypatch.setattr(detection_stage, "ray", played)
    spec = JobSpec.model_validate(
        {
            "name": "r",
            "runs": str(tmp_path),
            "data": {"format": "shapes", "train": [{"count": 4}]},
            "cluster": {"workers": 2, "resource_timeout_s": 0.3, "max_failures": 1},
        }
    )
    job, pieces = cast(DetectionJob, None), split_into_chunks(6, 2)
    answers = _work_through(Run(spec), job, None, pieces, threading.Event(), cast(DetectionPool, played))
    return [(piece.index, cast(str, answer)) for piece, answer in answers]


def test_a_dead_workers_piece_goes_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = work(tmp_path, monkeypatch, PlayedRay(begins={0, 1, 2}, dies={0}))
    assert sorted(index for index, _ in done) == [0, 1, 2]
    assert not any("worker 0" in answer for _, answer in done)


def test_one_worker_that_is_placed_does_the_work_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = work(tmp_path, monkeypatch, PlayedRay(begins={1}, dies=set()))
    assert [answer for _, answer in done] == ["answer of worker 1"] * 3


def test_replacements_that_find_no_place_are_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JobError, match=r"no evaluation worker was placed within cluster.resource_timeout_s 0.3 s"):
        work(tmp_path, monkeypatch, PlayedRay(begins={0}, dies={0}))


def test_workers_that_die_again_and_again_end_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="evaluation workers died 2 times"):
        work(tmp_path, monkeypatch, PlayedRay(begins={0, 1, 2, 3}, dies={0, 1, 2, 3}))
