"""What the driver of training makes of the ends of its attempts; the attempts themselves are played."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from refinedet.pipeline.cluster import training_stage
from refinedet.pipeline.cluster.monitor import Monitor
from refinedet.pipeline.cluster.placement import NODE_LABEL, Placement
from refinedet.pipeline.cluster.training_stage import _Attempt, _TrainingJob
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Cluster, JobSpec
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError

DIED = {"error": RuntimeError("worker died\n  of old age")}
FINISHED = {"result": {"status": "finished", "step": 40}}
SAVED = {"result": {"status": "stopped", "step": 12}}


class FakeMonitor:
    name = "monitor"

    def __init__(self) -> None:
        self.draining: set[str] = set()
        self.stop = False
        self.messages: list[tuple[int, str, Any]] = []

    def drain(self) -> list[tuple[int, str, Any]]:
        messages, self.messages = self.messages, []
        return messages

    def set_stop(self, stop: bool) -> None:
        self.stop = stop


class FakePlacement(Placement):
    room = 2
    alive = frozenset("ab")

    def nodes(self) -> frozenset[str]:
        return self.alive - self.left_out

    def fits(self, workers: int, wait_s: float, stopped: Any = lambda: False) -> bool:
        return workers <= self.room


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(training_stage, "Placement", FakePlacement)
    return []


def make_job(events: list[dict[str, Any]], tmp_path: Path, **cluster: Any) -> _TrainingJob:
    values = {
        "name": "r",
        "runs": str(tmp_path),
        "data": {"format": "shapes", "train": [{"count": 4}]},
        "training": {"global_batch": 4},
        "cluster": {"workers": 2, **cluster},
    }
    run = Run(JobSpec.model_validate(values))
    return _TrainingJob(
        run,
        cast(Monitor, FakeMonitor()),
        lambda rank, kind, content: events.append(content),
        threading.Event(),
        preflight_only=False,
    )


def play(job: _TrainingJob, *attempts: tuple[str | None, dict[str, Any]]) -> list[int]:
    """Let attempts end as given: (why they were asked to save, how they ended). -> workers of each, filled in later."""
    rest: Iterator[tuple[str | None, dict[str, Any]]] = iter(attempts)
    workers: list[int] = []

    def run(attempt: _Attempt) -> dict[str, Any]:
        workers.append(attempt.workers)
        attempt.asked, outcome = next(rest)  # type: ignore[assignment]
        attempt.step = 9
        return outcome

    job._run = run  # type: ignore[method-assign]
    return workers


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_failures_are_counted_up_to_the_limit(events: list[dict[str, Any]], tmp_path: Path) -> None:
    job = make_job(events, tmp_path, max_failures=2)
    play(job, (None, DIED), (None, DIED), (None, FINISHED))
    assert job.run_attempts() == FINISHED["result"]
    assert kinds(events) == ["restarted", "restarted"]
    assert events[1]["message"] == "restart 2 of 2 allowed, after: of old age"
    job = make_job(events, tmp_path, max_failures=1)
    play(job, (None, DIED), (None, DIED))
    with pytest.raises(JobError, match="training failed: of old age"):
        job.run_attempts()


def test_what_comes_with_notice_is_no_failure(events: list[dict[str, Any]], tmp_path: Path) -> None:
    job = make_job(events, tmp_path, max_failures=0)
    play(job, ("preempted", SAVED), ("resized", SAVED), ("preempted", DIED), (None, FINISHED))
    assert job.run_attempts() == FINISHED["result"]
    assert kinds(events) == ["preempted", "resized", "preempted"]
    assert "saved at step 12" in events[0]["message"]
    assert "the node went before all was saved" in events[2]["message"]


def test_a_stop_ends_the_job_saved_or_not(events: list[dict[str, Any]], tmp_path: Path) -> None:
    job = make_job(events, tmp_path)
    play(job, ("stop", SAVED))
    with pytest.raises(StoppedError, match="saved at step 12"):
        job.run_attempts()
    job = make_job(events, tmp_path)
    play(job, ("stop", DIED))
    with pytest.raises(StoppedError, match="failed before they had saved"):
        job.run_attempts()


def test_a_users_mistake_is_not_tried_again(events: list[dict[str, Any]], tmp_path: Path) -> None:
    job = make_job(events, tmp_path)
    play(job, (None, {"result": {"status": "failed"}}))
    job.fatal.append((True, "the shards are of another data set"))
    with pytest.raises(UserError, match="the shards are of another data set"):
        job.run_attempts()


def test_an_elastic_job_takes_the_largest_size_there_is_room_for(
    events: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakePlacement, "room", 3)
    job = make_job(events, tmp_path, workers={"min": 1, "max": 4}, resize_interval_s=0.001)
    assert job.sizes == [4, 2, 1], "three workers cannot share a batch of four"
    assert play(job, (None, FINISHED)) == []
    job.run_attempts()
    small, large = _Attempt(1, step=3, looked_at=0.0), _Attempt(2, step=3, looked_at=0.0)
    assert job._can_grow(small), "one more makes two"
    assert job._can_grow(large), "two more make four"
    assert not job._can_grow(_Attempt(4, step=3, looked_at=0.0))
    assert not job._can_grow(_Attempt(1, step=0, looked_at=0.0)), "not before it has taken a step"
    monkeypatch.setattr(FakePlacement, "room", 1)
    assert not job._can_grow(_Attempt(2, step=3, looked_at=0.0))


def test_a_job_that_grew_in_vain_waits_for_other_nodes(
    events: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(events, tmp_path, workers={"min": 2, "max": 4}, resize_interval_s=0.001)
    play(job, ("resized", SAVED), (None, FINISHED))
    job.run_attempts()  # two before, and two after: STRICT_PACK may not use another node's room
    monkeypatch.setattr(FakePlacement, "room", 4)
    assert not job._can_grow(_Attempt(2, step=3, looked_at=0.0))
    monkeypatch.setattr(FakePlacement, "alive", frozenset("abc"))
    assert job._can_grow(_Attempt(2, step=3, looked_at=0.0))


def test_a_draining_node_or_a_wish_to_stop_makes_the_workers_save(events: list[dict[str, Any]], tmp_path: Path) -> None:
    job = make_job(events, tmp_path)
    attempt = _Attempt(2, nodes={0: "a", 1: "b"})
    job.monitor.draining = {"c"}
    job._ask(attempt)
    assert (attempt.asked, job.monitor.stop) == (None, False)
    job.monitor.draining = {"b"}
    job._ask(attempt)
    assert (attempt.asked, job.monitor.stop) == ("preempted", True)
    job.stop_requested.set()
    job._ask(attempt)
    assert attempt.asked == "stop"
    attempt.asked_at -= job.spec.cluster.stop_grace_s + 1
    with pytest.raises(StoppedError, match="did not save within 120 s"):
        job._ask(attempt)


def test_the_node_of_a_stalled_rank_is_left_out_where_there_are_others(
    events: list[dict[str, Any]], tmp_path: Path
) -> None:
    stalled = {"kind": "stalled", "step": 5, "message": "", "facts": {"ranks": [1], "hosts": ["node-b"]}}
    for changes, expected in (({}, {"b"}), ({"leave_out_stalled": False}, set())):
        job = make_job(events, tmp_path, **changes)
        job.monitor.messages = [(0, "event", stalled), (1, "event", stalled)]
        job._deliver(_Attempt(2, nodes={0: "a", 1: "b"}))
        assert job.placement.left_out == expected
    assert kinds(events) == ["stalled", "left_out", "stalled"], "said once, however many ranks say it"
    job = make_job(events, tmp_path)
    job.monitor.messages = [(0, "event", {**stalled, "facts": {"ranks": [0, 1], "hosts": ["a", "b"]}})]
    job._deliver(_Attempt(2, nodes={0: "a", 1: "b"}))
    assert job.placement.left_out == set(), "nobody would be left"


def test_labels_keep_workers_off_what_is_left_out() -> None:
    placement = Placement(Cluster(labels={"pool": "spot"}))
    assert placement.labels() == {"pool": "spot"}
    placement.left_out = {"b", "a"}
    assert placement.labels() == {"pool": "spot", NODE_LABEL: "!in(a,b)"}


def test_no_place_in_time_is_said_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from refinedet.pipeline.cluster import placement as module

    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 1e9})
    monkeypatch.setattr(FakePlacement, "room", 2)
    waits: list[int] = []
    placement = FakePlacement(Cluster(workers=4, resource_timeout_s=1e-6))
    with pytest.raises(JobError, match=r"no place for 4 workers came within 1e-06 s, the cluster has 2 CPU; add nodes"):
        placement.find([4], lambda: waits.append(1), lambda: False)
    assert waits == [1]
    assert placement.find([4, 2], lambda: None, lambda: False) == 2
    assert placement.find([4], lambda: None, lambda: True) is None, "a stop ends the wait"
