"""The train stage's answers to its workers' messages and ends, without Ray Train, which is in the drills."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import WorkerGroupError
from refinedet.pipeline.cluster import training_stage as module
from refinedet.pipeline.cluster.mailbox import Mailbox
from refinedet.pipeline.cluster.training_stage import _Training, explain, scaling_config
from refinedet.pipeline.cluster.worker_task import Fatal
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Cluster, JobSpec
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError
from refinedet.pipeline.training.records import Event, TrainResult

FINISHED = TrainResult("finished", 16, 2, None, None)
SAVED = dataclasses.replace(FINISHED, status="stopped", step=8)
FAILED = WorkerGroupError("a long story", {1: RuntimeError("first line\nrank 1 died")})


class PlayedMailbox:
    """Messages of the current fit; keeps the requests to stop."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, Any]] = []
        self.actor = None
        self.stops: list[bool] = []

    def take(self, *, stop: bool = False) -> list[tuple[int, Any]]:
        self.stops.append(stop)
        messages, self.messages = self.messages, []
        return messages


def make(tmp_path: Path, *fits: tuple[list[Any], Any], **cluster: Any) -> tuple[_Training, list[Event]]:
    """A stage whose fits send messages of rank 0, then end with a result or an error."""
    spec = JobSpec.model_validate(
        {
            "name": "r",
            "runs": str(tmp_path),
            "data": {"format": "shapes", "train": [{"count": 4}]},
            "cluster": {"workers": 2, **cluster},
        }
    )
    told: list[Event] = []
    mailbox = PlayedMailbox()
    training = _Training(
        Run(spec), cast(Mailbox, mailbox), lambda message: told.append(cast(Event, message)), threading.Event()
    )
    script = iter(fits)

    class PlayedTrainer:
        def fit(self) -> Any:
            messages, end = next(script)
            mailbox.messages += [(0, message) for message in messages]
            if isinstance(end, BaseException):
                raise end
            return type("Result", (), {"return_value": end})

    training._trainer = PlayedTrainer  # type: ignore[method-assign]
    return training, told


STARTED = Event("started", 0, "rank 0 runs", {"rank": 0})


def kinds(told: list[Event]) -> list[str]:
    return [event.kind for event in told]


def test_a_fit_that_finishes_is_the_result(tmp_path: Path) -> None:
    training, told = make(tmp_path, ([STARTED, Event("saved", 8, "")], FINISHED))
    assert training.train() is FINISHED
    assert kinds(told) == ["started", "saved"]


def test_a_new_checkpoint_gives_the_failures_back(tmp_path: Path) -> None:
    training, told = make(tmp_path, ([STARTED, Event("saved", 8, "")], FAILED), ([STARTED], FINISHED))
    assert training.train() is FINISHED
    assert kinds(told) == ["started", "saved", "restarted", "started"]
    training, _ = make(tmp_path, ([STARTED, Event("saved", 8, "")], FAILED), ([STARTED], FAILED))
    with pytest.raises(JobError, match="training failed: rank 1 died"):
        training.train()


def test_a_late_message_of_the_stage_before_is_passed_over(tmp_path: Path) -> None:
    training, told = make(tmp_path, ([("train", (32, 32)), STARTED], FINISHED))
    assert training.train() is FINISHED
    assert kinds(told) == ["started"]


def test_a_resume_says_how_many_steps_are_done_again(tmp_path: Path) -> None:
    resumed = Event("resumed", 8, "resumed from step 8")
    training, told = make(tmp_path, ([STARTED, resumed], FINISHED))
    training.step = 11
    training.train()
    assert told[-1].message == "resumed from step 8; steps to be done again: 3"
    training, told = make(tmp_path, ([STARTED, resumed], FINISHED))
    training.train()
    assert told[-1].message == "resumed from step 8"


def test_a_new_number_of_workers_is_told_with_the_checkpoint_it_starts_from(tmp_path: Path) -> None:
    saved = Event("saved", 6, "checkpoint of step 4 is committed", {"step": 4})  # reported two steps later
    training, told = make(tmp_path, ([STARTED, saved, STARTED], FINISHED))
    training.train()
    assert "from the checkpoint of step 4" in next(event.message for event in told if event.kind == "resized")


def test_workers_that_saved_for_a_preempted_node_go_on_without_it(tmp_path: Path) -> None:
    gone = Event("preempted", 0, "", {"nodes": ["b"]})
    training, _ = make(tmp_path, ([STARTED, gone], SAVED), ([STARTED], FINISHED))
    assert training.train() is FINISHED
    assert scaling_config(training.cluster, training.leaving).label_selector == {"ray.io/node-id": "!in(b)"}


def test_a_stop_that_saved_says_where(tmp_path: Path) -> None:
    training, _ = make(tmp_path, ([STARTED], SAVED))
    training.stop.set()
    training.ranks.add(0)
    with pytest.raises(StoppedError, match=r"saved at step 8|before the workers were placed"):
        training.train()


@pytest.mark.parametrize(("by_user", "error"), [(True, UserError), (False, JobError)])
def test_a_fatal_error_is_not_retried(tmp_path: Path, by_user: bool, error: type[Exception]) -> None:
    training, _ = make(tmp_path, ([STARTED, Fatal(by_user, "no such file")], FAILED))
    with pytest.raises(error, match="no such file"):
        training.train()


def test_waits_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "session_nodes", lambda: [])
    training, told = make(tmp_path, resource_timeout_s=5)
    training._check_placement()
    assert kinds(told) == ["waiting"]
    assert "need 2 CPU, and there are 0" in told[0].message
    training.waiting_since = time.monotonic() - 6
    with pytest.raises(JobError, match=r"no place for 2 workers came within 5 s"):
        training._check_placement()
    training.ranks = {0}
    training.stop.set()
    training._check_stop()
    assert training.stop_deadline is not None
    training.stop_deadline = time.monotonic() - 1
    with pytest.raises(StoppedError, match="did not save within 120 s"):
        training._check_stop()


def test_ray_train_gets_the_cluster_section_whole() -> None:
    elastic = scaling_config(
        Cluster.model_validate({"workers": {"min": 1, "max": 4}, "gpus_per_worker": 1, "placement": "SPREAD"})
    )
    assert (elastic.num_workers, elastic.use_gpu, elastic.placement_strategy) == ((1, 4), True, "SPREAD")
    assert elastic.resources_per_worker == {"CPU": 1, "GPU": 1}
    assert scaling_config(Cluster(workers=3, labels={"pool": "spot"})).label_selector == {"pool": "spot"}


def test_an_error_is_explained_by_its_innermost_cause() -> None:
    assert explain(FAILED) == "rank 1 died"
    assert explain(ValueError()) == "ValueError"
    killed = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 8.79GB used / 9GB"
    pages = OutOfMemoryError(
        f"{killed}\nOOM kill reason: Memory usage\nRefer to the documentation on how to address it"
    )
    assert explain(pages).startswith(f"{killed}. All programs on the node count")


def test_the_loss_of_ray_trains_own_actor_is_a_failure_as_others_are(tmp_path: Path) -> None:
    killed = OutOfMemoryError("1 worker(s) were killed\nRefer to the documentation")
    training, told = make(tmp_path, ([STARTED, Event("saved", 8, "")], killed), ([STARTED], FINISHED))
    assert training.train() is FINISHED
    assert "1 worker(s) were killed" in next(event.message for event in told if event.kind == "restarted")
    training, _ = make(tmp_path, ([STARTED], killed))
    with pytest.raises(JobError, match=r"training failed: .*1 worker\(s\) were killed"):
        training.train()
