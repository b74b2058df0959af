"""Verdicts on slow and on stuck ranks, and the ledger of a run's time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from refinedet.pipeline.runs import storage
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.goodput import Ledger, read_goodput
from refinedet.pipeline.training.records import StepTimes
from refinedet.pipeline.training.stragglers import OWN_WORK, StragglerWatch, find_stragglers
from refinedet.pipeline.training.watchdog import StallReport, StallVerdict, Watchdog, judge_stall
from refinedet.pipeline.training.world import World


def times(**parts: float) -> StepTimes:
    return StepTimes(**{"data": 0.01, "forward": 0.1, "backward": 0.2, **parts}, total=0.5)


def test_equal_ranks_have_no_straggler() -> None:
    assert find_stragglers(torch.tensor([[0.01, 0.1, 0.0], [0.01, 0.11, 0.0]])) == []


def test_what_two_equal_ranks_differ_by_on_a_busy_machine_is_no_straggler() -> None:
    assert find_stragglers(torch.tensor([[0.02, 0.056, 0.0], [0.02, 0.079, 0.0]])) == []


@pytest.mark.parametrize("part", OWN_WORK)
def test_the_slow_rank_and_its_slow_part_are_named(part: str) -> None:
    slow = [0.6 if phase == part else 0.05 for phase in OWN_WORK]
    (found,) = find_stragglers(torch.tensor([[0.05, 0.05, 0.0], [0.05, 0.05, 0.0], slow]))
    assert (found.rank, found.part) == (2, part)


def test_of_two_ranks_the_slower_is_named() -> None:
    (found,) = find_stragglers(torch.tensor([[0.01, 0.5, 0.0], [0.01, 0.1, 0.0]]))
    assert (found.rank, found.part) == (0, "forward")


class PlayedWorld:
    """Two ranks, of which the other takes `other_s` for the forward pass of each step."""

    size, device = 2, torch.device("cpu")

    def __init__(self) -> None:
        self.other_s = 0.1

    def all_gather(self, row: torch.Tensor) -> torch.Tensor:
        other = torch.tensor([0.01, self.other_s, 0.0], dtype=row.dtype)
        return torch.stack([row, other])


def test_a_rank_is_named_once_it_was_slow_in_two_windows_in_a_row() -> None:
    world = PlayedWorld()
    watch = StragglerWatch(cast(World, world), window=2)
    said = []
    for window, seconds in enumerate((0.1, 0.5, 0.1, 0.5, 0.5, 0.5)):  # one slow window alone may be chance
        world.other_s = seconds
        said += [(window, found.rank, found.part) for _ in range(2) for found in watch.add(times())]
    assert said == [(4, 1, "forward")]


def report(rank: int, **changes: Any) -> StallReport:
    return StallReport(
        **{
            "rank": rank,
            "host": f"node-{rank}",
            "pid": 7,
            "step": 12,
            "phase": "reduce",
            "seconds": 600.0,
            "waiting": True,
            "stack": "in all_reduce",
            **changes,
        }
    )


HOSTS = ["node-0", "node-1", "node-2"]


def test_a_rank_outside_the_collective_holds_up_the_rest() -> None:
    busy = report(1, waiting=False, phase="data", stack="in read")
    verdict = judge_stall([report(0), busy, report(2)], HOSTS)
    assert (verdict.ranks, verdict.hosts) == ((1,), ("node-1",))
    assert "in data for 600 s" in str(verdict)
    assert "in read" in str(verdict)


def test_a_rank_without_a_report_is_frozen_or_dead() -> None:
    verdict = judge_stall([report(0), report(2, waiting=False)], HOSTS)
    assert verdict.ranks == (1,)
    assert "no sign of life" in str(verdict)


def test_where_all_wait_nobody_is_blamed() -> None:
    verdict = judge_stall([report(rank) for rank in range(3)], HOSTS)
    assert verdict.ranks == ()
    assert "network" in str(verdict)


def test_goodput_counts_from_the_jobs_beginning(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), 0, active=True, began_at=time.time() - 30)
    ledger.begin()
    ledger.add(1, times(), saved=False)
    ledger.close()
    assert 30 <= read_goodput(str(tmp_path)).restart_s < 40


def test_half_a_page_of_the_ledger_is_no_attempt(tmp_path: Path) -> None:
    for name in ("attempt-0000.json.3f2a.partial", "notes.txt"):
        storage.write_bytes(str(tmp_path / "goodput" / name), b"")
    ledger = Ledger(str(tmp_path), 0, active=True)
    ledger.add(1, times(), saved=False)
    ledger.close()
    assert read_goodput(str(tmp_path)).attempts == 1


def test_a_stall_is_told_of_where_storage_is_away(world: World, tmp_path: Path) -> None:
    (tmp_path / "stalls").write_text("a file in place of a directory")
    told: list[StallVerdict] = []
    watchdog = Watchdog(str(tmp_path), world, StepClock(world.device), 0.2, told.append)
    while not told:
        time.sleep(0.01)
    watchdog.close()
    assert told[0].ranks == (0,)


def test_rank_0_judges_a_stall_and_the_others_take_its_verdict(tmp_path: Path) -> None:
    """Three ranks in one process: 0 and 1 wait in a collective, 2 computes."""
    verdicts: dict[int, StallVerdict] = {}
    watchdogs = []
    for rank in range(3):
        clock = StepClock(torch.device("cpu"))
        clock.phase = "forward" if rank == 2 else "reduce"
        world = cast(World, ThreeRanks(rank))
        watchdogs.append(
            Watchdog(str(tmp_path), world, clock, 1.0, lambda found, rank=rank: verdicts.update({rank: found}))
        )
    deadline = time.monotonic() + 20
    while len(verdicts) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    for watchdog in watchdogs:
        watchdog.close()
    assert {rank: found.ranks for rank, found in verdicts.items()} == {0: (2,), 1: (2,), 2: (2,)}
    assert len({str(found) for found in verdicts.values()}) == 1
    assert len(verdicts[0].reports) == 3


def test_where_rank_0_gives_no_verdict_it_is_named(tmp_path: Path) -> None:
    verdicts: list[StallVerdict] = []
    clock = StepClock(torch.device("cpu"))
    watchdog = Watchdog(str(tmp_path), cast(World, ThreeRanks(1)), clock, 0.5, verdicts.append)
    deadline = time.monotonic() + 20
    while not verdicts and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    assert (verdicts[0].ranks, verdicts[0].hosts) == ((0,), ("host-0",))
    assert "gave no verdict" in str(verdicts[0])


class ThreeRanks:
    """One of three ranks that share a directory; collectives give what the others would."""

    size, device = 3, torch.device("cpu")

    def __init__(self, rank: int) -> None:
        self.rank, self.is_main = rank, rank == 0

    def broadcast_object(self, value: tuple[int, str]) -> tuple[int, str]:
        return (1, value[1])  # the same attempt on all

    def all_gather_object(self, value: str) -> list[str]:
        return [f"host-{rank}" for rank in range(3)]


def test_a_slow_step_leaves_no_report_behind(world: World, tmp_path: Path) -> None:
    told: list[StallVerdict] = []
    watchdog = Watchdog(str(tmp_path), world, StepClock(world.device), 1.0, told.append)
    while not list(tmp_path.glob("stalls/*/rank-0.json")):
        time.sleep(0.01)
    watchdog.finished(1)
    while list(tmp_path.glob("stalls/*/rank-0.json")):
        time.sleep(0.01)
    watchdog.close()
    assert not told


def test_a_rank_that_hangs_in_validation_is_named_once_its_limit_is_over(world: World, tmp_path: Path) -> None:
    told: list[StallVerdict] = []
    clock = StepClock(world.device)
    began = time.monotonic()
    watchdog = Watchdog(str(tmp_path), world, clock, 0.2, told.append)
    watchdog.allow(1.0)  # what a validation may take
    with clock.measure("validation"):
        while not told:
            time.sleep(0.01)
    watchdog.close()
    assert time.monotonic() - began > 1.2
    assert "in validation for" in str(told[0])


def test_goodput_adds_up_what_was_useful_lost_and_waited_for(tmp_path: Path) -> None:
    crashed = {
        "started_at": 100.0,
        "first_step_at": 110.0,
        "updated_at": 160.0,
        "resumed_step": 0,
        "step": 50,
        "useful_s": 40.0,
        "waiting_s": 10.0,
        "saves": [[20, 16.0, 4.0], [40, 32.0, 8.0]],
        "ended": None,
    }
    finished = {
        "started_at": 170.0,
        "first_step_at": 175.0,
        "updated_at": 225.0,
        "resumed_step": 40,
        "step": 90,
        "useful_s": 45.0,
        "waiting_s": 5.0,
        "saves": [[90, 45.0, 5.0]],
        "ended": "finished",
    }
    folder = tmp_path / "goodput"
    folder.mkdir()
    for number, page in enumerate((crashed, finished)):
        (folder / f"attempt-{number:04d}.json").write_text(json.dumps(page))
    goodput = read_goodput(str(tmp_path))
    assert goodput.useful_s == pytest.approx(32 + 45)
    assert goodput.lost_s == pytest.approx(10)
    assert goodput.waiting_s == pytest.approx(8 + 5)
    assert goodput.restart_s == pytest.approx(10 + 15)
    assert goodput.attempts == 2
