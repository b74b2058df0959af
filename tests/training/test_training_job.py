"""A whole job of one worker on real shards, without Ray."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.model import RefineDet
from refinedet.model.cost import count_cost
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.records import Event, StepRecord
from refinedet.pipeline.training.training_job import Attempt, check_job, train_job
from refinedet.pipeline.training.world import World
from safetensors.torch import load_file

from tests.training.workers import run_together


class ListLink:
    """Keeps messages, and requests a stop in the step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps: list[StepRecord] = []
        self.events: list[Event] = []
        self.stop_at = stop_at

    @property
    def stop_requested(self) -> bool:
        return len(self.steps) + 1 == self.stop_at

    def push(self, message: StepRecord | Event, *, wait: bool = False) -> None:
        (self.steps if isinstance(message, StepRecord) else self.events).append(message)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    spec = {
        "name": "job",
        "runs": str(tmp_path),
        "data": {"format": "shapes", "image_size": 96, "train": [{"count": 8}], "loader_workers": 0,
                 "exif": "displayed"},
        "model": {
            "num_classes": 10, "input_size": 64, "backbone": "test_resnet", "tcb_channels": 16,
            "prediction_block": False, "norm": "frozen", "tcb_norm": False,
        },
        "training": {
            "global_batch": 4, "epochs": 2, "precision": "fp32", "decay_epochs": [1], "deterministic": True,
            "validate_every_epochs": 2,
        },
    }  # fmt: skip
    run = Run(JobSpec.model_validate(spec))
    prepare_shards(run.spec.data, "train", storage.join(run.shards, "train"))
    return run


def test_a_job_runs_to_its_end_and_tells_of_it(world: World, run: Run) -> None:
    link = ListLink(stop_at=3)
    stopped = train_job(run, world, link, validate=lambda detector, epochs: {"AP": 0.5})
    assert (stopped.status, stopped.step) == ("stopped", 3)
    again = ListLink()
    result = train_job(run, world, again, attempt=Attempt(1), validate=lambda detector, epochs: {"AP": 0.5})
    assert (result.status, result.step, result.metrics) == ("finished", 4, {"AP": 0.5})
    assert RefineDet.from_pretrained(run.weights).exif == "displayed"  # as the data's
    assert [record.step for record in link.steps + again.steps] == [1, 2, 3, 4]
    for record in link.steps + again.steps:
        assert set(record.shares) == {*(f"survivors_{level}" for level in range(1, 5)), "rows"}
        assert all(0 <= share <= 1 for share in record.shares.values())
        assert 0 < record.shares["rows"] <= 1
        assert record.line()["shares"] == record.shares
    assert [event.kind for event in again.events] == ["preflight", "resumed", "validated", "saved"]


@pytest.mark.parametrize("peak", [None, 2e12])
def test_the_rate_of_the_model_is_logged_and_its_share_of_a_peak_that_is_known(
    world: World, run: Run, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinedet.pipeline.training.upkeep.peak_flops", lambda device: peak)
    link = ListLink(stop_at=2)
    train_job(run, world, link, validate=lambda detector, epochs: {"AP": 0.5})
    forward = count_cost(run.spec.model).total_gflops
    for record in link.steps:
        flops = record.images_per_s * 3 * forward * 1e9
        assert record.model_tflops == pytest.approx(flops / 1e12)
        assert record.mfu == (pytest.approx(flops / peak) if peak else None)
        assert ("mfu" in record.line()) is bool(peak)


def test_a_window_of_profiling_outside_the_run_is_the_users_mistake(world: World, run: Run) -> None:
    training = run.spec.training.model_copy(update={"profile_steps": (2, 5)})
    outside = Run(run.spec.model_copy(update={"training": training}))
    with pytest.raises(UserError, match=r"profile_steps \[2, 5\] ends after the run's 4 steps; choose one within"):
        train_job(outside, world, ListLink(), validate=lambda detector, epochs: {"AP": 0.5})


def test_pretrained_layers_stay_as_they_are_where_their_rate_is_0(world: World, run: Run) -> None:
    training = run.spec.training.model_copy(update={"backbone_lr_multiplier": 0.0})
    fixed = Run(run.spec.model_copy(update={"training": training}))
    torch.manual_seed(fixed.spec.seed)
    before = RefineDet(fixed.spec.model).state_dict()
    trained: list[bool] = []

    def see(detector: RefineDet, epochs: int) -> dict[str, float]:
        trained.extend(parameter.requires_grad for parameter in detector.pretrained_parameters())
        return {"AP": 0.5}

    validate = {"validate": see}
    assert train_job(fixed, world, ListLink(stop_at=3), **validate).status == "stopped"
    assert train_job(fixed, world, ListLink(), attempt=Attempt(1), **validate).status == "finished"
    assert trained
    assert not any(trained), "they have no backward pass"
    after = load_file(fixed.weights)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.startswith("backbone.body."):
            assert torch.equal(after[name], value), name
    assert not any(
        torch.equal(after[name], before[name]) for name in before if name.startswith("adm.") and "weight" in name
    )


def test_a_fault_of_the_preflight_is_the_users_at_the_first_start_only(world: World, run: Run) -> None:
    too_much = 2.0**60
    assert check_job(run, world, ListLink(), Attempt(memory_bytes=too_much)).faults
    with pytest.raises(UserError, match="the job needs about"):
        train_job(run, world, ListLink(), attempt=Attempt(memory_bytes=too_much))
    with pytest.raises(RuntimeError, match="the job needs about"):
        train_job(run, world, ListLink(), attempt=Attempt(1, memory_bytes=too_much))


def count_reads(world: World, spec: dict[str, Any], stop_at: int | None) -> dict[str, int]:
    """Train, and count this rank's reads of whole files, by directory and name."""
    counts: Counter[str] = Counter()
    read, digest = storage.read_bytes, storage.digest_file

    def counted_read(path: str, *part: int) -> bytes:
        if not part:  # a header is read apart
            counts["/".join(path.split("/")[-2:])] += 1
        return read(path, *part)

    def counted_digest(path: str, *rest: Any) -> Any:
        counts["/".join(path.split("/")[-2:])] += 1
        return digest(path, *rest)

    storage.read_bytes, storage.digest_file = counted_read, counted_digest
    run = Run(JobSpec.model_validate(spec))
    train_job(run, world, ListLink(stop_at), validate=lambda detector, epochs: {"AP": 0.5})
    return dict(counts)


@pytest.mark.dist
def test_a_resume_reads_each_file_once_for_all_ranks(run: Run, tmp_path: Path) -> None:
    start = RefineDet(run.spec.model).save_pretrained(tmp_path / "start")
    spec = run.spec.model_dump(mode="json")
    spec["training"]["init_weights"] = str(start)
    first = run_together(count_reads, tmp_path, spec, 3)
    again = run_together(count_reads, tmp_path, spec, None)
    for counts in (first, again):
        together = sum((Counter(of_rank) for of_rank in counts), Counter())
        read = {name: times for name, times in together.items() if not name.split("/")[-1].startswith(".preflight")}
        assert read["train/index.json"] == 1
        assert read["train/shard-000000.tar"] == 1, "the preflight's sample"
    parts = {name for counts in again for name in counts if "/part-" in name}
    assert len(parts) == 2
    assert all(sum(counts.get(name, 0) for counts in again) == 1 for name in parts)
    assert not any("manifest.json" in name for name in again[1])
