"""Real processes are killed, frozen, slowed and stopped; training continues as if nothing had been."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from refinedet.pipeline.training.goodput import read_goodput
from refinedet.pipeline.training.watchdog import EXIT_STALLED

from tests.training.workers import STEPS, TINY, Fault, Outcome, read_weights, run_workers

pytestmark = pytest.mark.dist
ZERO_1 = TINY.model_copy(update={"zero_stage": 1})
ELASTIC = ZERO_1.model_copy(update={"global_batch": 12, "micro_batch": None, "reference_batch": 12})
"""The norm takes its statistics over the whole global batch, at any number of workers."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Two workers, ZeRO 1, fp32, deterministic, from beginning to end."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    return folder, run_workers(folder, 2, ZERO_1)


def losses(*runs: list[Outcome]) -> dict[int, dict[str, float]]:
    """Losses by step; a step that was taken again must give the same."""
    by_step: dict[int, dict[str, float]] = {}
    for run in runs:
        for record in run[0].steps:
            assert by_step.setdefault(record["step"], record["losses"]) == record["losses"]
    return by_step


def assert_close_weights(ours: Path, theirs: Path) -> None:
    """Within 1e-4, buffers too."""
    for name, expected in read_weights(theirs).items():
        torch.testing.assert_close(read_weights(ours)[name], expected, atol=1e-4, rtol=0)


def committed(run: Path) -> list[int]:
    """Steps of the committed checkpoints."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/*/manifest.json"))


def test_a_killed_worker_and_a_resume_give_bitwise_the_uninterrupted_run(
    uninterrupted: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    folder, whole = uninterrupted
    fault = Fault(rank=random.randrange(2), step=random.randrange(3, STEPS), kind="kill")
    killed = run_workers(tmp_path / "run", 2, ZERO_1, fault)
    assert killed[fault.rank].exit_code == -9, fault
    assert killed[1 - fault.rank].exit_code != 0, fault
    resumed = run_workers(tmp_path / "run", 2, ZERO_1)
    assert [outcome.exit_code for outcome in resumed] == [0, 0]
    assert resumed[0].events[0]["kind"] == "resumed"
    assert fault.step - resumed[0].events[0]["step"] <= 2 * 2, "at most the interval that was being written is lost"
    assert losses(killed, resumed) == losses(whole), fault
    ours, theirs = read_weights(tmp_path / "run"), read_weights(folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), fault
    goodput = read_goodput(str(tmp_path / "run"))
    assert goodput.attempts == 2
    assert goodput.useful_s > 0
    assert goodput.restart_s > 0


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_number_of_workers_may_change(tmp_path: Path, stage: int) -> None:
    spec = ELASTIC.model_copy(update={"zero_stage": stage})
    whole = run_workers(tmp_path / "whole", 2, spec)
    parts = [
        run_workers(tmp_path / "run", 4, spec, Fault(rank=3, step=4, kind="stop")),
        run_workers(tmp_path / "run", 2, spec, Fault(rank=1, step=9, kind="stop")),
        run_workers(tmp_path / "run", 3, spec),
    ]
    assert [part[0].result["status"] for part in parts] == ["stopped", "stopped", "finished"]  # type: ignore[index]
    assert [part[0].result["step"] for part in parts] == [5, 10, STEPS]  # type: ignore[index]
    seen = losses(*parts)
    for step, expected in losses(whole).items():
        assert seen[step] == pytest.approx(expected, abs=1e-4)
    assert_close_weights(tmp_path / "run", tmp_path / "whole")


def test_from_two_workers_to_one_and_back(tmp_path: Path) -> None:
    whole = run_workers(tmp_path / "whole", 2, ELASTIC)
    parts = [
        run_workers(tmp_path / "run", 2, ELASTIC, Fault(rank=0, step=3, kind="stop")),
        run_workers(tmp_path / "run", 1, ELASTIC, Fault(rank=0, step=8, kind="stop")),
        run_workers(tmp_path / "run", 2, ELASTIC),
    ]
    seen = losses(*parts)
    assert sorted(seen) == list(range(1, STEPS + 1)), "every step once, at any world size"
    for step, expected in losses(whole).items():
        assert seen[step] == pytest.approx(expected, abs=1e-4)
    assert_close_weights(tmp_path / "run", tmp_path / "whole")


def test_one_flipped_bit_is_named_and_the_checkpoint_before_is_taken(
    uninterrupted: tuple[Path, list[Outcome]], tmp_path: Path
) -> None:
    _, whole = uninterrupted
    run_workers(tmp_path / "run", 2, ZERO_1, Fault(rank=0, step=9, kind="stop"))
    (part,) = (tmp_path / "run" / "checkpoints" / "step-10").glob("part-00001*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    resumed = run_workers(tmp_path / "run", 2, ZERO_1)
    passed, started = resumed[1].events[:2]
    assert passed["kind"] == "passed_over"
    assert part.name in passed["message"]
    assert "does not match its digest" in passed["message"]
    assert (started["kind"], started["step"]) == ("resumed", 8)
    assert losses(resumed)[STEPS] == losses(whole)[STEPS]


def test_a_stop_of_one_rank_saves_and_stops_all(tmp_path: Path) -> None:
    outcomes = run_workers(tmp_path / "run", 2, ZERO_1, Fault(rank=1, step=5, kind="stop"))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert [outcome.result["step"] for outcome in outcomes] == [6, 6]  # type: ignore[index]
    assert committed(tmp_path / "run")[-1] == 6


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_same_words(tmp_path: Path) -> None:
    outcomes = run_workers(tmp_path / "run", 2, ZERO_1, Fault(rank=1, step=6, kind="poison"))
    assert [outcome.exit_code for outcome in outcomes] == [1, 1]
    assert outcomes[0].error == outcomes[1].error
    assert outcomes[0].error.startswith("NonFiniteError: step 6: the loss is not finite on rank 1: total nan, fit nan")
    assert "samples 1-0-4, 1-0-5" in outcomes[0].error
    assert committed(tmp_path / "run")[-1] == 5


def test_a_stream_that_fails_on_one_rank_stops_all(tmp_path: Path) -> None:
    outcomes = run_workers(tmp_path / "run", 2, ZERO_1, Fault(rank=1, step=6, kind="raise"))
    assert outcomes[0].error == outcomes[1].error
    assert "step 6: no batch on rank 1: RuntimeError('the disk is gone')" in outcomes[0].error


@pytest.mark.slow
def test_a_slow_rank_is_named_with_the_part_that_is_slow(tmp_path: Path) -> None:
    spec = ZERO_1.model_copy(update={"epochs": 9})  # 45 steps; a verdict needs two windows of 20
    outcomes = run_workers(tmp_path / "run", 2, spec, Fault(rank=1, step=0, kind="slow"))
    said = [event for event in outcomes[0].events if event["kind"] == "straggler"]
    assert [(event["facts"]["rank"], event["facts"]["part"]) for event in said] == [(1, "data")]


@pytest.mark.parametrize("kind", ["sleep", "freeze"])
def test_a_rank_that_makes_no_progress_is_named_with_its_stack(tmp_path: Path, kind: str) -> None:
    spec = ZERO_1.model_copy(update={"stall_timeout_s": 6.0})
    outcomes = run_workers(tmp_path / "run", 2, spec, Fault(rank=1, step=6, kind=kind))
    assert outcomes[0].exit_code in (EXIT_STALLED, 1), "its own watchdog ends it, or the loss of the other rank"
    (attempt,) = (tmp_path / "run" / "stalls").iterdir()
    verdict = json.loads((attempt / "verdict.json").read_text())
    assert (verdict["step"], verdict["ranks"]) == (5, [1])
    if kind == "sleep":
        assert outcomes[1].exit_code == EXIT_STALLED
        assert "time.sleep(60)" in verdict["reason"]
        assert "in data for" in verdict["reason"]
    else:
        assert "no sign of life" in verdict["reason"]
