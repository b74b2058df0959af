"""One MLflow run for one job: found again by a tag, written by one process, with its true status at the end.

Child runs hold the job's attempts and its evaluations.
"""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import commit
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.redaction import redact_text
from refinedet.pipeline.tracking import registry, stores
from refinedet.pipeline.tracking.guardian import Guardian
from refinedet.pipeline.tracking.node_metrics import NodeSampler
from refinedet.pipeline.tracking.run_tags import OWNER_TAG, RUN_TAG
from refinedet.pipeline.tracking.writer import RunWriter, Status, is_away

stores.configure_mlflow()

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import RunInfo, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

logger = logging.getLogger(__name__)

TRACKING_FILE = "tracking.json"
_PARENT_TAG = "mlflow.parentRunId"
_CHILDREN = {"single": "evaluate", "multiscale": "multiscale"}
"""mode of an evaluation -> name of its child run"""


class RunTracker(RunWriter):
    """The run of the job in `run_dir`: started, or resumed where an earlier process left it.

    The directory's `tracking.json` holds the identity by which the run is found again; a copy or another run under the
    same name has another identity. As a context manager it sets the final status by how the block ends. Every start is
    an attempt, a child run. The node of this process is sampled into system metrics.

    Raises UserError where the store cannot be reached at a first start. At a later start training continues without
    it, and everything is delivered once it answers.
    """

    def __init__(
        self, tracking: Tracking, *, name: str, run_dir: str, runs: str, command: Sequence[str] | None = None
    ) -> None:
        """command  that started the job, for MLflow's column Source; default: this process's"""
        self.run_dir = run_dir
        self.uri = stores.tracking_uri(tracking, runs)
        self._owner = uuid.uuid4().hex
        stores.prepare_store(self.uri)
        stores.quiet_mlflow()
        with stores.opening_alone(self.uri):
            client = MlflowClient(self.uri)
        known = read_identity(run_dir)
        self.identity = known.get("identity") or uuid.uuid4().hex
        try:
            self.experiment_id = _experiment(client, tracking.experiment, stores.artifact_location(self.uri, runs))
            started, self.resumed = self._start_or_resume(client, name)
            run_id, self._began_s = started.run_id, started.start_time / 1000
        except (MlflowException, OSError) as error:
            if not (known.get("run_id") and known.get("uri") == redact_text(self.uri) and is_away(error)):
                raise UserError(stores.unreachable(self.uri, error)) from error
            logger.warning("No MLflow store answers at %s; the run continues, its records wait.", redact_text(self.uri))
            self.experiment_id, run_id, self.resumed = known["experiment_id"], known["run_id"], True
            self._began_s = float(known.get("began") or time.time())
        super().__init__(client, lambda: run_id)
        if self.resumed:
            self._outbox.put_call("the status", lambda: self.client.update_run(self.run_id, status="RUNNING"))
        self.set_tags({OWNER_TAG: self._owner, **_source_tags(command)})
        self._num_attempts = int(known.get("attempts") or 0) + 1
        self._write_identity("RUNNING")
        self._guardian = Guardian(uri=self.uri, run_id=self.run_id, owner=self._owner)
        self._children: list[RunWriter] = []
        self._pictures: RunWriter | None = None
        self._result_times: dict[str, float] = {}
        self.child(f"attempt {self._num_attempts}").set_tags({"refinedet.attempt": str(self._num_attempts)})
        self._sampler = NodeSampler(self.log_load)

    def child(self, name: str) -> RunWriter:
        """A child run of this one, the same one for the same name; it ends with this run, if not before."""
        made = child_run(self.client, self.experiment_id, parent=self.run_id, identity=self.identity, name=name)
        self._children.append(made)
        return made

    def log_load(self, values: Mapping[str, float]) -> None:
        """Log a sample of a node at the second of the run, which no later start of the driver repeats."""
        self.log_metrics(int(time.time() - self._began_s), values)

    def log_picture(self, key: str, step: int, image: np.ndarray) -> None:
        """Log to a child run of its own: beside a run's many parameters MLflow's charts have no room for a picture."""
        if self._pictures is None:
            self._pictures = self.child("pictures")
        self._pictures.log_picture(key, step, image)

    def logged_steps(self, name: str) -> set[int]:
        """Steps at which the store has a metric of this run; none, with a warning, where it is away."""
        try:
            return {point.step for point in self.client.get_metric_history(self.run_id, name)}
        except (MlflowException, OSError) as error:
            logger.warning("What MLflow has of the starts before is not known: %s", stores.first_line(error))
            return set()

    def log_result(self, mode: str, step: int, content: Mapping[str, Any]) -> None:
        """Log an evaluation to the run, for the table of runs, and to a child run of its own.

        mode     "single" or "multiscale"
        step     of the weights
        content  of the mode in `metrics.json`
        """
        self._result_times[mode] = _log_result(self, self.child(_CHILDREN[mode]), mode, step, content)

    def log_model(
        self,
        path: str,
        *,
        name: str,
        digest: str,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        data_digest: str = "",
    ) -> None:
        """Log a packaged model, a local directory, as a model of this run, and register it; the same weights once.

        name         under which it is registered too
        digest       of the weights
        metrics      of the model, as `evaluation_metrics` gives them
        data_digest  of the validation shards that they were measured on: the version becomes `champion` where its
                     score beats the champion's on the same data
        """
        model = registry.PackagedModel(
            path, name, digest, step, dict(metrics or {}), data_digest, dict(self._result_times)
        )
        self._outbox.put_call(
            "the model", lambda: registry.log_and_register(self.client, self.experiment_id, self.run_id, model)
        )

    def discard(self, reason: str) -> None:
        """Delete the run and its children: a user's mistake, met before anything was trained, is no failed run."""
        self.finish("FAILED", reason)
        try:
            for run_id in (*(child.run_id for child in self._children), self.run_id):
                self.client.delete_run(run_id)
            storage.remove(storage.join(self.run_dir, TRACKING_FILE))
        except (MlflowException, OSError) as error:
            logger.warning("The MLflow run of a job that did not begin could not be deleted: %s", error)

    def finish(self, status: Status, reason: str = "", *, timeout_s: float = 60.0) -> bool:
        """Set the final status of the run and of its attempt; True once the store has everything."""
        if self._status != "RUNNING":
            return True
        self._sampler.close()
        delivered = super().finish(status, reason, timeout_s=timeout_s)
        for child in self._children:  # where the store is away, it is away for all
            delivered &= child.finish(status, reason, timeout_s=timeout_s if delivered else 0.1)
        try:
            self._write_identity(status, reason)
        except Exception as error:  # storage may be why the run failed; MLflow gets the status all the same
            logger.warning("%s could not be written: %s", TRACKING_FILE, error)
        self._guardian.dismiss()
        stores.settle_store(self.uri)
        return delivered

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.finish("KILLED", kind.__name__)
        else:
            self.finish("FAILED", f"{kind.__name__}: {stores.first_line(error)}")

    @property
    def location(self) -> str:
        """The run's page on a server, or the command that shows the local store, as it can be run anywhere."""
        if self.uri.startswith(("http://", "https://")):
            return f"{redact_text(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", redact_text(self.uri)])

    def _start_or_resume(self, client: MlflowClient, name: str) -> tuple[RunInfo, bool]:
        found = _find_run(client, self.experiment_id, self.identity)
        if found:
            return found, True
        tags = {RUN_TAG: self.identity, OWNER_TAG: self._owner, "refinedet.folder": redact_text(self.run_dir)}
        return client.create_run(self.experiment_id, tags=tags, run_name=name).info, False

    def _write_identity(self, status: str, reason: str = "") -> None:
        storage.write_json(
            storage.join(self.run_dir, TRACKING_FILE),
            {
                "identity": self.identity,
                "uri": redact_text(self.uri),
                "experiment_id": self.experiment_id,
                "run_id": self.run_id,
                "began": self._began_s,
                "status": status,
                "reason": redact_text(reason),
                "time": time.time(),
                "location": self.location,
                "attempts": self._num_attempts,
            },
        )


def log_later_result(
    tracking: Tracking, *, run_dir: str, runs: str, mode: str, step: int, content: Mapping[str, Any]
) -> bool:
    """Log an evaluation of a job that has ended to its MLflow run, as `RunTracker.log_result` does.

    Returns whether the store took it. False, with a warning, where the job has no MLflow run.
    """
    known = read_identity(run_dir)
    if not known.get("run_id"):
        logger.warning("%s has no MLflow run; the results are written to its directory alone.", run_dir)
        return False
    client, run_id = MlflowClient(stores.tracking_uri(tracking, runs)), str(known["run_id"])
    stores.quiet_mlflow()
    run = RunWriter(client, lambda: run_id)
    child = child_run(
        client,
        str(known["experiment_id"]),
        parent=run_id,
        identity=str(known.get("identity") or run_id),
        name=_CHILDREN[mode],
    )
    _log_result(run, child, mode, step, content)
    return run.close() and child.close()


def _log_result(run: RunWriter, child: RunWriter, mode: str, step: int, content: Mapping[str, Any]) -> float:
    """Log to both; returns the time of the points, seconds since 1970."""
    time_s = time.time()
    run.log_evaluation(step, mode, content, time_s=time_s)
    child.log_evaluation(step, mode, content, time_s=time_s)
    child.end("FINISHED")
    return time_s


def child_run(client: MlflowClient, experiment_id: str, *, parent: str, identity: str, name: str) -> RunWriter:
    """A writer to the child run `name` of the run `parent`, made by the first delivery where it does not exist."""
    key = f"{identity}/{name}"

    def find() -> str:
        found = _find_run(client, experiment_id, key)
        if found:
            client.update_run(found.run_id, status="RUNNING")
            return found.run_id
        tags = {RUN_TAG: key, _PARENT_TAG: parent, **_source_tags(None)}
        return client.create_run(experiment_id, tags=tags, run_name=name).info.run_id

    return RunWriter(client, find)


def read_identity(run_dir: str) -> dict[str, Any]:
    """`tracking.json` of a run's directory; empty where it does not exist or cannot be read."""
    path = storage.join(run_dir, TRACKING_FILE)
    try:
        found = storage.read_json(path) if storage.exists(path) else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        logger.warning("%s cannot be read; MLflow starts a new run.", path)
        return {}
    return found


def _find_run(client: MlflowClient, experiment_id: str, key: str) -> RunInfo | None:
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{key}'", ViewType.ACTIVE_ONLY, max_results=1)
    return found[0].info if found else None


def _experiment(client: MlflowClient, name: str, location: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another job has just made it
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"MLflow experiment {name!r} is deleted; bring it back with `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or choose another with tracking.experiment"
        )
    return experiment.experiment_id


def _source_tags(command: Sequence[str] | None) -> dict[str, str]:
    """MLflow's columns Source and User, and the whole command."""
    program = os.path.basename(sys.argv[0])
    arguments = list(command or [program if program not in ("", "__main__.py") else "refinedet", *sys.argv[1:]])
    # MLflow's pages show what follows the last slash, so that a path or an address would cut the command.
    shown = [arguments[0], *(os.path.basename(word) for word in arguments[1:3])]
    tags = {"mlflow.source.name": redact_text(shlex.join(shown)), "mlflow.source.type": "LOCAL"}
    tags["command"] = redact_text(shlex.join(arguments))
    revision = commit()
    if revision:
        tags["mlflow.source.git.commit"] = revision.removesuffix("+changes")
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = str(os.getuid())
    return tags
