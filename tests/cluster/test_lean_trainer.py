"""What Ray Train leaves to helpers that are not started here."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from refinedet.pipeline.cluster.lean_trainer import _WorkerGroup


@pytest.mark.parametrize("after_start", [True, False])
def test_workers_that_do_not_start_give_their_places_back(monkeypatch: pytest.MonkeyPatch, after_start: bool) -> None:
    """A worker may die between its start and the call of the training function; the next attempt needs the places."""
    ended: list[str] = []

    class Started:
        def shutdown(self) -> None:
            ended.append("state")

    def start(self: Any, builder: Any) -> None:
        monkeypatch.setattr(builder, "shutdown", lambda: ended.append("builder"))
        if after_start:
            self._worker_group_state = Started()
        raise RuntimeError("a worker died")

    monkeypatch.setattr(WorkerGroup, "_start_impl", start)
    group = _WorkerGroup.__new__(_WorkerGroup)
    group._worker_group_state, group._world_rank_to_ongoing_poll = None, {}
    with pytest.raises(RuntimeError, match="a worker died"):
        group._start()
    assert ended == ["state" if after_start else "builder"]
    assert not group.has_started()
