"""Reading job specs: inheritance, overrides, and one clear sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import dump_spec, load_spec, parse_spec
from refinedet.pipeline.runs.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
JOBS = sorted(path for path in (REPOSITORY / "jobs").rglob("*.yaml") if path.parent.name not in ("base", "sweeps"))
QUICKSTART = str(REPOSITORY / "jobs" / "quickstart.yaml")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_resolves_and_survives_a_round_trip(path: Path) -> None:
    spec = load_spec(str(path))
    assert parse_spec(yaml.safe_load(dump_spec(spec)), source="dump") == spec


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_opens_with_what_a_user_needs(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Command:", "Hardware:", "Expected", "Time"):
        assert word in head, f"{path.name} does not have {word}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.input_sise=3", ["model.input_sise", "did you mean `input_size`?"]),
        ("trainin.epochs=3", ["trainin", "did you mean `training`?"]),
        ("training.epochs=-1", ["training.epochs", "greater than 0", "-1"]),
        ("training.epochs=many", ["training.epochs", "integer", "'many'"]),
        ("model.input_size=100", ["input_size", "multiple of 64", "100"]),
        ("cluster.workers={min: 4, max: 2}", ["cluster.workers", "min must not exceed max", "4 and 2"]),
        ("cluster.workers={mix: 2, max: 3}", ["cluster.workers.mix", "did you mean `min`?"]),
        ("data.train=[{cont: 3}]", ["data.train.0.cont", "did you mean `count`?"]),
        ("training.zero_stage=3", ["training.zero_stage", "1 or 2", "received 3"]),
        ("training.global_batch=10 ", ["nothing is wrong"]),
        ("training.micro_batch=0", ["training.micro_batch", "greater than 0", "0"]),
        ("name=../elsewhere", ["name", "'../elsewhere'"]),
        ("data.format=coco", ["data.train", "images", "annotations"]),
        ("seed=-1", ["seed", "greater than or equal to 0", "-1"]),
        ("data.seed=-1", ["data.seed", "greater than or equal to 0", "-1"]),
        ("training.learning_rate=.inf", ["training.learning_rate", "finite number", "inf"]),
        ("training.warmup_epochs=.nan", ["training.warmup_epochs", "finite number", "nan"]),
        ("training.decay_epochs=[2, .inf]", ["training.decay_epochs", "finite number", "inf"]),
        ("training.decay_epochs=[-1]", ["training.decay_epochs", "greater than or equal to 0", "-1"]),
        ("training.momentum=1", ["training.momentum", "less than 1"]),
        ("training.ema_decay=1", ["training.ema_decay", "less than 1"]),
        ("cluster.stop_grace_s=.inf", ["cluster.stop_grace_s", "finite number"]),
        ("model.max_detections=0", ["max_detections must be at least 1", "received 0"]),
        ("model.pre_nms_top_k=-5", ["pre_nms_top_k must be at least 1", "received -5"]),
        ("model.tcb_channels=0", ["tcb_channels must be at least 1", "received 0"]),
        ("model.nms_iou=1.5", ["nms_iou must lie in [0, 1]", "received 1.5"]),
        ("model.score_threshold=1", ["score_threshold must lie in [0, 1)", "received 1.0"]),
        ("model.score_threshold=.nan", ["score_threshold must lie in [0, 1)", "received nan"]),
        ("model.negatives_per_positive=0", ["negatives_per_positive must be a number above 0", "received 0.0"]),
        ("model.negatives_per_positive=.inf", ["negatives_per_positive must be a number above 0", "received inf"]),
        ("model.arm_iou=[.nan, 0.5]", ["arm_iou must be (low, high)", "nan"]),
        ("multiscale.merge={score_threshold: .nan}", ["multiscale.merge.score_threshold", "finite number"]),
        ("no-equals-sign", ["key=value", "no-equals-sign"]),
    ],
)
def test_a_mistake_is_one_sentence(override: str, said: list[str]) -> None:
    if said == ["nothing is wrong"]:
        assert load_spec(QUICKSTART, [override]).training.global_batch == 10
        return
    with pytest.raises(UserError) as caught:
        load_spec(QUICKSTART, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in said:
        assert word in message


def test_a_base_is_merged_below_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "name: below\ndata: {format: shapes, train: [{count: 5}, {count: 6}], seed: 3}\ntraining: {epochs: 7}\n"
    )
    (tmp_path / "above.yaml").write_text("base: below.yaml\nname: above\ndata: {train: [{count: 9}]}\n")
    spec = load_spec(str(tmp_path / "above.yaml"), ["training.global_batch=8"])
    assert (spec.name, spec.training.epochs, spec.training.global_batch) == ("above", 7, 8)
    assert [split.count for split in spec.data.train] == [9]
    assert spec.data.seed == 3


def test_a_loop_of_bases_ends(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: a.yaml\nname: a\n")
    with pytest.raises(UserError, match="break the loop"):
        load_spec(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("content", ["- a\n- b\n", "name: [", "", "\x00"])
def test_what_is_no_spec_is_said_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"job\.yaml"):
        load_spec(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no job spec 'nowhere\.yaml'"):
        load_spec("nowhere.yaml")


def test_the_schema_for_editors_knows_every_section() -> None:
    schema = JobSpec.model_json_schema()
    assert set(schema["properties"]) == set(JobSpec.model_fields)
    assert "theta" in schema["$defs"]["RefineDetConfig"]["properties"]


def test_a_job_that_ships_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_spec("quickstart") == load_spec(QUICKSTART)
    assert load_spec("ablation/table2_1_full").name == "ablation_table2_1_full"
    (tmp_path / "quickstart.yaml").write_text("name: mine\ndata: {format: shapes, train: [{count: 5}]}\n")
    assert load_spec("quickstart.yaml").name == "mine", "a file here comes first"
    with pytest.raises(UserError, match=r"no job spec 'quickstar'; give a file.* quickstart"):
        load_spec("quickstar")
