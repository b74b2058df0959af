from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.tracking.runs import MlflowClient, RunTracker


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


def test_importing_the_package_does_not_import_mlflow():
    code = "import sys, pipeline.tracking as t; t.draw_detections; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
