"""The loop, alone in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.finite import NonFiniteError
from refinedet.pipeline.training.loop import train
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.world import World

from tests.training.fakes import TinyDetector, TinyStream, TinySums, tiny_loss

SPEC = Training(
    global_batch=4,
    reference_batch=4,
    micro_batch=2,
    epochs=3,
    learning_rate=0.05,
    warmup_learning_rate=0.01,
    decay_epochs=(2,),
    precision="fp32",
    ema_decay=0.9,
)


def run(
    world: World, folder: Path | str, spec: Training = SPEC, **options: Any
) -> tuple[TrainResult, list[StepRecord]]:
    records: list[StepRecord] = []
    stream = options.pop("stream", {})
    task = Task(
        detector=options.pop("detector", None) or TinyDetector(),
        loss=options.pop("loss", tiny_loss),
        make_stream=lambda start, plan: TinyStream(start, plan, world.rank, **stream),  # type: ignore[arg-type]
        run_dir=str(folder),
        seed=3,
        facts=options.pop("facts", {}),
        fork_from=options.pop("fork_from", None),
    )
    return train(spec, world, task, Callbacks(on_step=records.append, **options)), records


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "weights.safetensors")


def stop_after(records: list[int], steps: int) -> Any:
    def asked() -> bool:
        records.append(0)
        return len(records) == steps

    return asked


def test_it_learns_and_leaves_weights(world: World, tmp_path: Path) -> None:
    result, records = run(world, tmp_path)
    assert result.status == "finished"
    assert [record.step for record in records] == list(range(1, 16))
    assert (records[6].epoch, records[6].batch) == (1, 1)
    assert set(records[0].losses) == {"total", "fit", "size"}
    assert all(record.shares == {"rows": 1.0} for record in records), "of several micro-batches, whatever their sizes"
    assert records[-1].losses["total"] < records[0].losses["total"]
    assert set(weights(tmp_path)) == set(TinyDetector().state_dict())
    assert records[5].times.total >= records[5].times.forward > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_stop_and_resume_equal_the_uninterrupted_run_bitwise(world: World, tmp_path: Path, stage: int) -> None:
    spec = SPEC.model_copy(update={"zero_stage": stage})
    _, whole = run(world, tmp_path / "whole", spec)
    first, before = run(world, tmp_path / "cut", spec, stop_requested=stop_after([], 7))
    assert (first.status, first.step) == ("stopped", 7)
    events: list[Event] = []
    second, after = run(world, tmp_path / "cut", spec, on_event=events.append)
    assert second.status == "finished"
    assert events[0].kind == "resumed"
    assert [r.losses for r in before + after] == [r.losses for r in whole]
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_epochs_of_a_finished_run_equal_the_run_that_had_them(world: World, tmp_path: Path) -> None:
    _, whole = run(world, tmp_path / "whole")
    _, before = run(world, tmp_path / "extended", SPEC.model_copy(update={"epochs": 2}))
    _, after = run(world, tmp_path / "extended")
    assert [r.losses for r in before + after] == [r.losses for r in whole]
    ours, theirs = weights(tmp_path / "extended"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_fork_goes_on_from_another_run_and_leaves_it_alone(world: World, tmp_path: Path) -> None:
    _, whole = run(world, tmp_path / "whole")
    _, before = run(world, tmp_path / "first", SPEC.model_copy(update={"epochs": 2}))
    kept = snapshot(tmp_path / "first")
    _, after = run(world, tmp_path / "same", fork_from=str(tmp_path / "first"))
    assert [r.losses for r in before + after] == [r.losses for r in whole]
    ours, theirs = weights(tmp_path / "same"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    slower = SPEC.model_copy(update={"learning_rate": 0.01})
    stopped, _ = run(world, tmp_path / "slower", slower, fork_from=str(tmp_path / "first"),
                     stop_requested=stop_after([], 2))  # fmt: skip
    assert stopped.step == 12
    _, rest = run(world, tmp_path / "slower", slower, fork_from="nowhere")  # its own checkpoint counts
    assert rest[0].step == 13
    assert not torch.equal(weights(tmp_path / "slower")["rare.weight"], theirs["rare.weight"])
    assert snapshot(tmp_path / "first") == kept


def test_a_fork_that_cannot_be_is_one_sentence_and_changes_nothing(world: World, tmp_path: Path) -> None:
    two = SPEC.model_copy(update={"epochs": 2})
    run(world, tmp_path / "first", two)
    with pytest.raises(UserError, match=r"has done 10 steps.*raise training\.epochs"):
        run(world, tmp_path / "none_left", two, fork_from=str(tmp_path / "first"))
    with pytest.raises(UserError, match="no checkpoint"):
        run(world, tmp_path / "absent", fork_from=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="global_batch 4"):
        run(world, tmp_path / "batch", SPEC.model_copy(update={"global_batch": 8}), fork_from=str(tmp_path / "first"))
    wider = TinyDetector()
    wider.rare = torch.nn.Linear(5, 4)
    with pytest.raises(UserError, match=r"rare\.weight"):
        run(world, tmp_path / "model", detector=wider, fork_from=str(tmp_path / "first"))
    (damaged,) = (tmp_path / "first" / "checkpoints" / "step-10").glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    kept = snapshot(tmp_path / "first")
    with pytest.raises(UserError, match="is damaged"):
        run(world, tmp_path / "damaged", fork_from=str(tmp_path / "first"))
    assert snapshot(tmp_path / "first") == kept


def test_a_loss_that_is_not_finite_stops_with_step_rank_parts_and_samples(world: World, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: .* rank 0: total nan, fit nan, size .*; samples 1-1-0, 1-1-1"):
        run(world, tmp_path, stream={"poison": (6, 0)})


def test_a_loss_that_is_not_finite_is_skipped_and_counted(world: World, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"non_finite": "skip"})
    events: list[Event] = []
    result, records = run(world, tmp_path, spec, stream={"poison": (6, 0)}, on_event=events.append)
    assert result.status == "finished"
    assert [record.step for record in records if not record.applied] == [7]
    assert records[-1].skipped_steps == 1
    assert [event.step for event in events if event.kind == "skipped"] == [7]


class Overflowing(TinyDetector):
    """Whose fourteenth forward with gradients, the second of step 7, leaves the range of numbers."""

    forwards = 0

    def forward(self, images: torch.Tensor, targets: object = None) -> torch.Tensor:
        self.forwards += torch.is_grad_enabled()  # positives are counted without
        return super().forward(
            images * torch.inf if torch.is_grad_enabled() and self.forwards == 14 else images, targets
        )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_skipped_leaves_no_trace_in_the_statistics(world: World, tmp_path: Path, stage: int) -> None:
    spec = SPEC.model_copy(update={"non_finite": "skip", "zero_stage": stage})
    result, records = run(world, tmp_path, spec, detector=Overflowing())
    assert result.status == "finished"
    assert [record.step for record in records if not record.applied] == [7]
    left = weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in left.values())
    assert left["body.1.num_batches_tracked"] == 2 * 14


def test_fp16_that_no_scale_saves_ends_for_good(world: World, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"precision": "fp16", "epochs": 30, "decay_epochs": ()})
    with pytest.raises(NonFiniteError, match=r"step \d+: fp16 training has diverged.*precision=bf16"):
        run(
            world,
            tmp_path,
            spec,
            loss=lambda predictions, targets: TinySums(*2 * [1e30 * predictions.float().sum()], torch.ones(1)),
        )


def test_a_run_may_live_behind_a_uri(world: World) -> None:
    folder = "memory://runs/uri"
    first, before = run(world, folder, stop_requested=stop_after([], 7))
    second, after = run(world, folder)
    assert (first.status, second.status) == ("stopped", "finished")
    assert [record.step for record in before + after] == list(range(1, 16))
    assert second.weights == "memory://runs/uri/weights.safetensors"


def test_validation_sees_the_average_and_its_score_chooses_the_best(world: World, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"validate_every_epochs": 1, "keep_last": 1, "ema_decay": 0.9})
    seen: list[torch.Tensor] = []

    def validate(detector: torch.nn.Module, epochs: int) -> dict[str, float]:
        assert not detector.training
        seen.append(detector.rare.weight.detach().clone())  # type: ignore[union-attr, operator]
        return {"AP": {1: 0.2, 2: 0.6, 3: 0.4}[epochs], "AP50": 1.0}

    result, records = run(world, tmp_path, spec, validate=validate)
    assert result.metrics["AP"] == 0.4
    assert result.best == str(tmp_path / "checkpoints" / "step-10")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-15"]
    assert torch.equal(weights(tmp_path)["rare.weight"], seen[-1])
    assert records[4].times.validation > 0


def test_only_the_weights_that_were_validated_have_a_score(world: World, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"validate_every_epochs": 2, "keep_last": 1})
    result, _ = run(world, tmp_path, spec, validate=lambda detector, epochs: {"AP": 0.6})
    assert result.best == str(tmp_path / "checkpoints" / "step-10")
    scores = {path.parent.name: json.loads(path.read_text())["score"] for path in tmp_path.glob("checkpoints/*/man*")}
    assert scores == {"step-10": 0.6, "step-15": None}


def test_other_shards_in_the_middle_of_a_run_are_refused(world: World, tmp_path: Path) -> None:
    run(world, tmp_path, stop_requested=stop_after([], 7), facts={"shards": "one"})
    with pytest.raises(UserError, match="was written with shards one, and now it is another"):
        run(world, tmp_path, facts={"shards": "another"})
    assert run(world, tmp_path, facts={"shards": "one"})[0].status == "finished"


def test_fp16_skips_a_step_that_overflows_halves_the_scale_and_remembers_it(world: World, tmp_path: Path) -> None:
    """A target of 1e17 overflows the scaled gradient, not the loss."""
    spec = SPEC.model_copy(update={"precision": "fp16"})
    stream = {"enlarge": (6, 1e17)}
    result, records = run(world, tmp_path, spec, stream=stream)
    assert result.status == "finished"
    assert 7 in [record.step for record in records if not record.applied]
    assert sum(record.applied for record in records) >= 10
    scales = [2.0**16, *(record.loss_scale for record in records)]
    for scale, record in zip(scales, records, strict=False):
        assert record.loss_scale == (scale if record.applied else scale / 2)
    assert records[-1].skipped_steps == 0, "an overflow of the scaled gradient is no fault"
    first, before = run(world, tmp_path / "cut", spec, stream=stream, stop_requested=stop_after([], 9))
    assert first.status == "stopped"
    _, after = run(world, tmp_path / "cut", spec, stream=stream)
    assert [record.losses for record in before + after] == [record.losses for record in records]
    assert [record.loss_scale for record in before + after] == scales[1:]


def test_the_checkpoint_of_another_version_is_refused_with_one_sentence(world: World, tmp_path: Path) -> None:
    run(world, tmp_path, stop_requested=stop_after([], 7))
    manifest = tmp_path / "checkpoints" / "step-7" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(UserError, match=r"step-7 has format 1 of another version.*reads format 2.*name=OTHER"):
        run(world, tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_is_not_supported_is_refused_with_the_reason(stage: int) -> None:
    with pytest.raises(ValueError, match=rf"must be 1 or 2, received {stage}: at 0 DeepSpeed reduces .*only after"):
        Training(zero_stage=stage)
