from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from refinedet.pipeline.config.spec import Tracking


@pytest.fixture(scope="session", autouse=True)
def no_tracking_uri():
    """Tests write to stores of their own, whatever the developer's environment holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow SQLite store with its tables made, which takes seconds; tests copy it."""
    from refinedet.pipeline.tracking.runs import RunTracker

    runs = tmp_path_factory.mktemp("store")
    RunTracker(Tracking(experiment="warm"), name="warm", run_dir=str(runs / "warm"), runs=str(runs)).finish("FINISHED")
    return runs / "mlflow.db"


@pytest.fixture
def runs(tmp_path, empty_store) -> Path:
    """A directory of runs with a store of its own."""
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder
