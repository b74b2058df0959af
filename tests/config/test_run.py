"""A run's home: one spec, one job at a time, stages done once."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from refinedet.pipeline.config.identity import lasting_part, spec_difference
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs.errors import JobError, UserError
from refinedet.pipeline.runs.lease import Lease
from refinedet.pipeline.runs.logs import log_folder


def make_spec(tmp_path: Path, **changes) -> JobSpec:
    values = {
        "name": "r",
        "runs": str(tmp_path),
        "data": {"format": "shapes", "train": [{"count": 4}]},
        "training": {"epochs": 3},
    }
    return JobSpec.model_validate(values | changes)


def test_another_spec_under_the_same_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    with Run(make_spec(tmp_path)).open():
        pass
    before = (tmp_path / "r" / "spec.yaml").read_bytes()
    with (
        pytest.raises(UserError, match=r"training\.epochs was 3, now 2"),
        Run(make_spec(tmp_path, training={"epochs": 2})).open(),
    ):
        pass
    assert (tmp_path / "r" / "spec.yaml").read_bytes() == before


def test_a_file_uri_is_a_path(tmp_path: Path) -> None:
    with Run(make_spec(tmp_path, runs=f"file://{tmp_path}")).open() as run:
        assert run.path == str(tmp_path / "r")


@pytest.mark.parametrize("runs", ["nosuchscheme://bucket/runs", "s3://bucket/runs"])
def test_storage_that_cannot_be_reached_is_one_sentence(runs: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with (
        pytest.raises(UserError, match=r"The run's directory .*/r cannot be written \(.+\); set runs=DIRECTORY"),
        Run(make_spec(tmp_path, runs=runs)).open(),
    ):
        pass


def test_runs_behind_uris_have_logs_of_their_own() -> None:
    folders = {log_folder(f"s3://{bucket}/runs/r") for bucket in "ab"}
    assert len(folders) == 2
    for folder in folders:
        shutil.rmtree(Path(folder).parent)


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"format": "coco", "root": "coco", "shards": "s3://bucket/shards"}
    training = {"init_weights": "weights.pth"}
    spec = make_spec(tmp_path, runs="runs", data=data, training=training)
    shipped = JobSpec.model_validate(Run(spec).spec_for_workers())
    assert shipped.runs == f"{tmp_path}/runs"
    assert (shipped.data.root, shipped.data.shards) == (f"{tmp_path}/coco", "s3://bucket/shards")
    assert shipped.training.init_weights == f"{tmp_path}/weights.pth"
    assert Run(shipped).path == Run(spec).path
    named = make_spec(tmp_path, data=data, training={"init_weights": "timm"})
    assert Run(named).spec_for_workers()["training"]["init_weights"] == "timm"


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    with Run(make_spec(tmp_path)).open():
        pass
    changed = make_spec(
        tmp_path, cluster={"workers": 4}, evaluation={"batch_size": 2}, training={"epochs": 3, "keep_last": 5}
    )
    with Run(changed).open() as run:
        assert run.spec.cluster.workers == 4


def test_a_spec_of_an_older_release_lacks_keys_that_have_defaults(tmp_path: Path) -> None:
    with Run(make_spec(tmp_path)).open():
        pass
    path = tmp_path / "r" / "spec.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "ema_decay" not in line))
    with Run(make_spec(tmp_path)).open():
        pass


def test_a_key_of_an_older_release_where_changes_are_allowed_is_no_difference(tmp_path: Path) -> None:
    run = Run(make_spec(tmp_path))
    with run.open():
        before = yaml.safe_load((tmp_path / "r" / "spec.yaml").read_text())
    before["evaluation"]["images_per_piece"] = before["evaluation"].pop("images_per_chunk")
    del before["data"]["sampling"]  # came later, and has a default
    (tmp_path / "r" / "spec.yaml").write_text(yaml.safe_dump(before))
    with run.open():
        assert "images_per_chunk" in (tmp_path / "r" / "spec.yaml").read_text()


def test_a_run_is_worked_on_by_one_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), Run(make_spec(tmp_path)).open():
        pass
    holder.kill()  # as hard as can be: a dead owner on this machine holds nothing
    holder.wait()
    with Run(make_spec(tmp_path)).open():
        pass


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ((3, (2,)), (5, (2,)), None),
        ((3, (2,)), (5, (2, 4)), None),
        ((3, ()), (5, (3,)), None),
        ((3, (2,)), (2, (2,)), "training.epochs was 3, now 2"),
        ((3, (2,)), (5, (2, 2.5)), "training.epochs was 3, now 5"),
        ((3, (2,)), (5, (1,)), "training.decay_epochs"),
        ((3, (2,)), (5, ()), "training.decay_epochs"),
    ],
)
def test_epochs_may_be_added_where_the_rates_of_earlier_steps_stay(
    tmp_path: Path, before: tuple, now: tuple, refused: str | None
) -> None:
    def opened(epochs: int, decay_epochs: tuple) -> None:
        spec = make_spec(tmp_path)
        training = spec.training.model_copy(update={"epochs": epochs, "decay_epochs": decay_epochs})
        with Run(spec.model_copy(update={"training": training})).open():
            pass

    opened(*before)
    if refused:
        with pytest.raises(UserError, match=refused.replace(".", r"\.")):
            opened(*now)
    else:
        opened(*now)
        with pytest.raises(UserError, match="was started from another spec"):
            opened(*before)


@pytest.mark.parametrize("content", ["", "\x00\x01", "name: [", "- a\n"], ids=["empty", "bytes", "half", "list"])
def test_a_spec_that_cannot_be_read_is_not_written_over(tmp_path: Path, content: str) -> None:
    with Run(make_spec(tmp_path)).open():
        pass
    path = tmp_path / "r" / "spec.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"spec\.yaml is empty or garbled") as refused, Run(make_spec(tmp_path)).open():
        pass
    assert "\n" not in str(refused.value)
    assert path.read_text() == content


def test_who_lost_the_run_is_told_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet.pipeline.config.run.Lease", functools.partial(Lease, ttl_s=0.6))
    told: list[str] = []

    def lose_it() -> None:
        with Run(make_spec(tmp_path)).open(told.append) as run:
            (lease,) = (tmp_path / "r" / "lease").iterdir()
            lease.with_name("00000002.json").write_text(json.dumps(json.loads(lease.read_text()) | {"token": "other"}))
            deadline = time.monotonic() + 30
            while not told and time.monotonic() < deadline:
                time.sleep(0.02)
            assert run.path in told[0]

    with pytest.raises(JobError, match="was taken over"):
        lose_it()


HOLD = """
import sys
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
spec = {"name": "r", "runs": sys.argv[1], "data": {"format": "shapes", "train": [{"count": 4}]},
        "training": {"epochs": 3}}
with Run(JobSpec.model_validate(spec)).open():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_stage_is_done_once_for_its_inputs(tmp_path: Path) -> None:
    run = Run(make_spec(tmp_path))
    with run.open():
        Path(run.file("out.txt")).write_text("result")
        assert not run.stage_is_done("train", {"a": 1})
        run.commit_stage("train", {"a": 1}, ["out.txt"])
        assert run.stage_is_done("train", {"a": 1})
        assert not run.stage_is_done("train", {"a": 2})
        assert not run.stage_is_done("evaluate", {"a": 1})


@pytest.mark.parametrize("damage", ["change", "shorten", "remove", "manifest"])
def test_a_damaged_output_means_again(tmp_path: Path, damage: str) -> None:
    run = Run(make_spec(tmp_path))
    with run.open():
        out = Path(run.file("out.txt"))
        out.write_text("result")
        run.commit_stage("train", {}, ["out.txt"])
        if damage == "change":
            out.write_text("resulT")
        elif damage == "shorten":
            out.write_text("resul")
        elif damage == "remove":
            out.unlink()
        else:
            Path(run.file("stages", "train.json")).write_text('{"inputs": ')
        assert not run.stage_is_done("train", {})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), Run(make_spec(tmp_path, runs=f"{tmp_path}/file")).open():
        pass


def test_the_difference_names_keys_added_and_taken_away() -> None:
    before = {"seed": 0, "data": {"format": "coco", "cache_dir": "a"}, "cluster": {"workers": 1}}
    now = {"seed": 1, "data": {"format": "voc", "cache_dir": "b"}, "cluster": {"workers": 2}}
    assert spec_difference(before, now) == ["data.format was 'coco', now 'voc'", "seed was 0, now 1"]


def test_what_may_change_is_no_part_of_what_is_learnt(tmp_path: Path) -> None:
    def part(*overrides: str) -> dict:
        spec = make_spec(tmp_path).model_dump(mode="json")
        for override in overrides:
            *parents, last = override.split(".")
            section = spec
            for parent in parents:
                section = section[parent]
            section[last] = "changed"
        return lasting_part(spec)

    assert part("training.keep_last", "model.nms_iou", "cluster.workers", "data.shards", "runs") == part()
    for learnt in ("training.epochs", "model.backbone", "seed", "data.format", "data.augmentation.mirror"):
        assert part(learnt) != part(), learnt
