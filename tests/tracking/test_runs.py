from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.tracking import stores
from refinedet.pipeline.tracking.runs import MlflowClient, RunTracker, log_later_result
from refinedet.pipeline.tracking.writer import evaluation_metrics


def _open(runs, name="job", **tracking) -> RunTracker:
    return RunTracker(Tracking(**tracking), name=name, run_dir=str(runs / name), runs=str(runs))


def _history(tracker, name):
    return sorted((point.step, point.value) for point in tracker.client.get_metric_history(tracker.run_id, name))


def test_a_run_holds_parameters_metrics_tags_data_sets_and_artifacts(runs):
    with _open(runs) as tracker:
        tracker.log_spec({"name": "job", "data": {"root": "s3://user:hunter2@bucket/coco"}})
        tracker.set_tags({"commit": "abc123"})
        tracker.log_dataset("coco-train", "f" * 64, context="training", source="s3://bucket/shards", num_samples=7)
        tracker.log_metrics(1, {"train/loss": 2.0, "train/learning_rate": 0.1})
        tracker.log_metrics(2, {"train/loss": float("nan")})
        (runs / "job" / "metrics.json").write_text("{}")
        tracker.log_artifact(str(runs / "job" / "metrics.json"))
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"name": "job", "data.root": "s3://***@bucket/coco"}
    assert run.data.tags["commit"] == "abc123"
    assert _history(tracker, "train/loss") == [(1, 2.0)]
    (dataset,) = run.inputs.dataset_inputs
    assert {tag.key: tag.value for tag in dataset.tags}["manifest.sha256"] == "f" * 64
    assert [file.path for file in tracker.client.list_artifacts(tracker.run_id)] == ["metrics.json"]
    assert (runs / "mlflow-artifacts").is_dir()


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("boom"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(1), "KILLED")]
)
def test_the_final_status_says_how_it_ended(runs, error, status):
    with pytest.raises(type(error)), _open(runs) as tracker:
        raise error
    run = tracker.client.get_run(tracker.run_id)
    assert run.info.status == status


def test_the_same_folder_resumes_the_same_run_and_another_does_not(runs):
    with _open(runs) as first:
        first.log_spec({"epochs": 1})
        first.log_metrics(1, {"loss": 2.0})
    with _open(runs) as second:
        assert second.resumed
        assert second.run_id == first.run_id
        assert second.flush()
        assert second.client.get_run(second.run_id).info.status == "RUNNING"
        second.log_spec({"epochs": 2})
        second.log_metrics(2, {"loss": 1.0})
    run = second.client.get_run(second.run_id)
    assert run.data.params == {"epochs": "1"}
    assert run.data.tags["resumed_with.epochs"] == "2"
    assert _history(second, "loss") == [(1, 2.0), (2, 1.0)]
    with _open(runs, "other") as other:
        assert other.run_id != first.run_id


def test_a_killed_process_leaves_a_run_that_is_marked_and_resumed(runs):
    code = f"""
        import os, signal
        from refinedet.pipeline.config.spec import Tracking
        from refinedet.pipeline.tracking.runs import RunTracker
        tracker = RunTracker(Tracking(), name="job", run_dir={str(runs / "job")!r}, runs={str(runs)!r})
        tracker.log_metrics(1, {{"loss": 2.0}})
        tracker.flush()
        print(tracker.run_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    client, run_id = MlflowClient(f"sqlite:///{runs}/mlflow.db"), killed.stdout.strip()
    deadline = time.monotonic() + 120
    while client.get_run(run_id).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.get_run(run_id).info.status == "KILLED", "its guardian marks it"
    with _open(runs) as tracker:
        assert tracker.resumed
        assert tracker.run_id == run_id
        tracker.log_metrics(2, {"loss": 1.0})
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert _history(tracker, "loss") == [(1, 2.0), (2, 1.0)]


def test_jobs_that_start_together_share_a_new_store(tmp_path):
    runs = tmp_path / "runs"  # without the tables that the fixture has made
    runs.mkdir()
    code = f"""
        import sys, time
        from pathlib import Path
        from refinedet.pipeline.config.spec import Tracking
        from refinedet.pipeline.tracking.runs import RunTracker
        name = sys.argv[1]
        print("ready", flush=True)
        while not Path({str(tmp_path / "go")!r}).exists():
            time.sleep(0.001)
        with RunTracker(Tracking(), name=name, run_dir={str(runs)!r} + "/" + name, runs={str(runs)!r}) as tracker:
            tracker.log_metrics(1, {{"loss": 2.0}})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    jobs = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for job in jobs:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    found = client.search_runs([experiment.experiment_id], "metrics.loss = 2 and attributes.status = 'FINISHED'")
    assert sorted(run.info.run_name for run in found) == ["a", "b"]


def test_replayed_records_change_nothing(runs):
    with _open(runs) as tracker:
        for _ in range(2):
            tracker.log_metrics(1, {"loss": 2.0}, time_s=1000.0)
            assert tracker.flush()
    assert _history(tracker, "loss") == [(1, 2.0)]


def test_a_missing_artifact_does_not_hold_the_status_up(runs, caplog):
    with _open(runs) as tracker:
        tracker.log_artifact(str(runs / "nowhere.json"))
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    assert "nowhere.json could not be delivered" in caplog.text


def test_a_server_that_is_away_is_a_user_error_at_the_first_start_only(runs, caplog):
    uri = "http://127.0.0.1:9"
    with pytest.raises(UserError, match="no MLflow store answers"):
        _open(runs, uri=uri)
    (runs / "job").mkdir(exist_ok=True)
    (runs / "job" / "tracking.json").write_text(
        '{"identity": "i", "run_id": "r", "experiment_id": "1", "uri": "http://127.0.0.1:9"}'
    )
    tracker = _open(runs, uri=uri)
    tracker.log_metrics(1, {"loss": 2.0})
    assert not tracker.finish("FINISHED", timeout_s=0.1)
    assert tracker.run_id == "r"


def test_a_deleted_experiment_is_named_with_its_remedy(runs):
    with _open(runs, experiment="gone") as tracker:
        pass
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore"):
        _open(runs, experiment="gone")


def test_a_store_that_is_no_database_is_a_user_error(runs):
    (runs / "mlflow.db").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        _open(runs)


METRICS = {
    "protocol": {"metric": "coco"},
    "coco": {"AP": 0.5, "AP50": 0.7, "APl": -1.0, "APs": None},
    "per_class": {"hot dog": {"AP": 0.25}, "../etc": {"AP": 0.5}, "..\\etc": {"AP": 0.75}, "none": {"AP": -1}},
}


def test_undefined_numbers_are_left_out_and_any_class_name_becomes_a_metric():
    assert evaluation_metrics("single", METRICS) == {
        "single/AP": 0.5,
        "single/AP50": 0.7,
        "single/class AP/hot dog": 0.25,
        "single/class AP/___etc": 0.5,
        "single/class AP/___etc_": 0.75,
    }


def test_results_are_logged_at_their_step_in_the_run_and_in_a_child(runs):
    with _open(runs) as tracker:
        tracker.log_result("single", 372, METRICS)
        (runs / "model").mkdir()
        (runs / "model" / "MLmodel").write_text("flavors: {}\n")
        metrics = evaluation_metrics("single", METRICS)
        tracker.log_model(str(runs / "model"), name="model", digest="a", step=372, metrics=metrics)
        tracker.log_metrics(10, {"validation/APl": -1.0, "validation/AP": 0.1, "loss/total": float("inf")})
    assert _history(tracker, "single/AP") == [(372, 0.5)]
    assert _history(tracker, "validation/AP") == [(10, 0.1)]
    assert not {"single/APl", "validation/APl", "loss/total"} & set(tracker.client.get_run(tracker.run_id).data.metrics)
    children = _children(tracker)
    assert set(children) == {"attempt 1", "evaluate"}
    assert children["evaluate"].data.metrics["single/class AP/hot dog"] == 0.25
    assert {child.info.status for child in children.values()} == {"FINISHED"}


def _children(tracker):
    found = tracker.client.search_runs([tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.run_id}'")
    return {run.info.run_name: run for run in found}


def test_every_start_is_an_attempt_with_its_own_end(runs):
    with pytest.raises(RuntimeError), _open(runs):
        raise RuntimeError("boom")
    with _open(runs) as tracker:
        pass
    statuses = {name: run.info.status for name, run in _children(tracker).items()}
    assert statuses == {"attempt 1": "FAILED", "attempt 2": "FINISHED"}


def test_an_evaluation_of_an_old_run_is_logged_to_it_once(runs):
    with _open(runs) as tracker:
        pass
    ended = tracker.client.get_run(tracker.run_id).info.end_time
    for name in ("job", "job", "other"):
        (runs / name).mkdir(exist_ok=True)
        logged = log_later_result(
            Tracking(), run_dir=str(runs / name), runs=str(runs), mode="single", step=7, content=METRICS
        )
        assert logged == (name == "job")
    children = _children(tracker)
    assert set(children) == {"attempt 1", "evaluate"}
    run = tracker.client.get_run(tracker.run_id)
    assert run.data.metrics["single/AP"] == children["evaluate"].data.metrics["single/AP"] == 0.5
    assert (run.info.status, run.info.end_time) == ("FINISHED", ended)
    assert children["evaluate"].info.status == "FINISHED"


def test_a_mistake_leaves_no_run(runs):
    tracker = _open(runs)
    tracker.discard("a mistake")
    assert not tracker.client.search_runs([tracker.experiment_id])
    with _open(runs) as again:
        assert not again.resumed


def test_the_page_of_a_run_says_who_started_it_from_what_and_how(runs):
    tracker = RunTracker(
        Tracking(),
        name="job",
        run_dir=str(runs / "job"),
        runs=str(runs),
        command=["refinedet", "launch", "jobs/a job.yaml", "password=hunter2"],
    )
    tracker.set_description("RefineDet++ on shapes")
    tracker.finish("FINISHED")
    tags = tracker.client.get_run(tracker.run_id).data.tags
    assert tags["mlflow.source.name"] == "refinedet launch 'a job.yaml'"
    assert tags["command"] == "refinedet launch 'jobs/a job.yaml' password=***"
    assert tags["mlflow.user"]
    assert tags["mlflow.note.content"] == "RefineDet++ on shapes"


def test_pictures_lie_in_a_child_run_without_parameters(runs):
    with _open(runs) as tracker:
        tracker.log_spec({"name": "job"})
        for step in (10, 20):
            tracker.log_picture("validation/a.jpg", step, np.zeros((8, 8, 3), np.uint8))
    assert not tracker.client.list_artifacts(tracker.run_id)
    (child,) = tracker.client.search_runs([tracker.experiment_id], "attributes.run_name = 'pictures'")
    assert child.info.status == "FINISHED"
    assert not child.data.params
    names = [file.path for file in tracker.client.list_artifacts(child.info.run_id, "images")]
    assert sum(name.endswith(".png") for name in names) == 2


def test_a_later_start_logs_a_nodes_load_at_later_steps(runs):
    name = "system/host-1/cpu_utilization_percentage"
    for load in (50.0, 60.0):
        with _open(runs) as tracker:
            time.sleep(1.1)
            tracker.log_load({name: load})
    (first, _), (second, _) = _history(tracker, name)
    assert 1 <= first < second < 600, "seconds of the run"


def test_a_better_model_becomes_champion_and_only_on_the_same_data(runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n")
    models = [("a", 0.5, "d1"), ("b", 0.4, "d1"), ("c", 0.6, "d1"), ("d", 0.9, "d2"), ("c", 0.6, "d1")]
    champions = []
    with _open(runs) as tracker:
        for digest, score, data in models:
            tracker.log_model(
                str(tmp_path / "model"),
                name="shapes/detector",
                digest=digest,
                step=5,
                metrics={"single/AP": score},
                data_digest=data,
            )
            assert tracker.flush()
            version = tracker.client.get_model_version_by_alias("shapes-detector", "champion")
            champions.append(version.tags["weights.sha256"])
    assert champions == ["a", "a", "c", "c", "c"]
    assert len(tracker.client.search_model_versions("name = 'shapes-detector'")) == 4
    logged = tracker.client.search_logged_models([tracker.experiment_id])
    assert {metric.value for model in logged for metric in model.metrics or []} == {0.5, 0.4, 0.6, 0.9}


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("http://127.0.0.1:9", "no MLflow store answers"),
        ("nosuchdatabase://host/db", "nosuchdatabase"),
        ("mysql+nosuchdriver://host/db", "nosuchdriver"),
        ("postgresql://m:a/b@127.0.0.1:9/db", "no MLflow store answers|needs the driver"),
    ],
)
def test_a_store_that_cannot_be_used_is_met_before_anything_starts(uri, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as met:
        stores.check_store(Tracking(uri=uri), str(tmp_path))
    assert "a/b" not in str(met.value)


def test_a_store_that_can_be_used_passes_the_check(runs):
    stores.check_store(Tracking(), str(runs))
    stores.check_store(Tracking(uri=f"sqlite:///{runs}/new/other.db"), str(runs))


def test_the_guardian_marks_children_too(runs):
    code = f"""
        import os, signal
        from refinedet.pipeline.config.spec import Tracking
        from refinedet.pipeline.tracking.runs import RunTracker
        tracker = RunTracker(Tracking(), name="job", run_dir={str(runs / "job")!r}, runs={str(runs)!r})
        child = tracker.child("evaluate")
        print(tracker.experiment_id, tracker.run_id, child.run_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    _, run_id, child_id = killed.stdout.split()
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    deadline = time.monotonic() + 120
    while client.get_run(run_id).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert client.get_run(child_id).info.status == "KILLED"


def test_importing_the_package_does_not_import_mlflow():
    code = "import sys, refinedet.pipeline.tracking; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
