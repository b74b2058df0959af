"""One MLflow run for one job: found again by a tag, written by one process, true to the end.

Every write goes through `MlflowClient`, never through MLflow's fluent interface, whose notion of an active run does
not survive several processes. Writes wait in an outbox, so that a server that goes away costs no step.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

from refinedet.pipeline.config.spec import Tracking
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.redaction import parameters, redact_text
from refinedet.pipeline.tracking import stores
from refinedet.pipeline.tracking.guardian import Guardian
from refinedet.pipeline.tracking.outbox import Outbox, Point

stores.configure_mlflow()

import requests  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
RUN_TAG = "refinedet.run"
OWNER_TAG = "refinedet.owner"
REASON_TAG = "refinedet.reason"
TRACKING_FILE = "tracking.json"

_MAX_PARAM_BYTES = 6000  # MLflow's own limits
_MAX_TAG_BYTES = 8000
_MAX_PARAMS = 100


class RunTracker:
    """The run of the job in `run_dir`: started, or resumed where an earlier process left it.

    The folder's `tracking.json` holds the identity by which the run is found again; a copy or another run under the
    same name has another identity. As a context manager it sets the final status by how the block ends.

    Raises UserError where the store cannot be reached at a first start. At a later start training goes on without it,
    and everything is delivered once it answers.
    """

    def __init__(self, tracking: Tracking, *, name: str, run_dir: str, runs: str) -> None:
        self.run_dir = run_dir
        self.uri = stores.tracking_uri(tracking, runs)
        self._owner = uuid.uuid4().hex
        self._status: str = "RUNNING"
        stores.prepare_store(self.uri)
        stores.quiet_mlflow()
        self.client = MlflowClient(self.uri)
        known = _read_identity(run_dir)
        self.identity = known.get("identity") or uuid.uuid4().hex
        try:
            self.experiment_id = self._experiment(tracking.experiment, stores.artifact_location(self.uri, runs))
            self.run_id, self.resumed = self._start_or_resume(name)
        except (MlflowException, OSError) as error:
            if not (known.get("run_id") and known.get("uri") == redact_text(self.uri) and _is_away(error)):
                raise UserError(
                    f"no MLflow store answers at {redact_text(self.uri)} ({_first_line(error)}); start it, or set "
                    "tracking.uri (without one, a SQLite file in the runs folder is used)"
                ) from error
            logger.warning("No MLflow store answers at %s; the run goes on, its records wait.", redact_text(self.uri))
            self.experiment_id, self.run_id, self.resumed = known["experiment_id"], known["run_id"], True
        self._outbox = Outbox(self._send_points, is_away=_is_away)
        if self.resumed:
            self._outbox.put_call("the status", lambda: self.client.update_run(self.run_id, status="RUNNING"))
            self.set_tags({OWNER_TAG: self._owner})
        self._write_identity("RUNNING")
        self._guardian = Guardian(uri=self.uri, run_id=self.run_id, owner=self._owner)

    # --- what a job writes

    def log_spec(self, spec: Mapping[str, Any]) -> None:
        """Log the resolved spec as parameters, redacted. What changed since an earlier start becomes a tag."""
        values = {name: _clip(value, _MAX_PARAM_BYTES) for name, value in parameters(spec).items()}
        self._outbox.put_call("the parameters", lambda: self._send_parameters(values))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Facts about the run, such as commit and versions."""
        entries = [RunTag(name, _clip(redact_text(str(value)), _MAX_TAG_BYTES)) for name, value in tags.items()]
        self._outbox.put_call("tags", lambda: self.client.log_batch(self.run_id, tags=entries))

    def log_dataset(self, name: str, digest: str, *, context: str, source: str, num_samples: int) -> None:
        """Log shards as an input of the run. `digest` is their manifest's; `context` is "training" or "validation"."""
        dataset = Dataset(
            name=name,
            digest=digest[:36],  # MLflow's limit; the whole digest is among the tags
            source_type="webdataset",
            source=redact_text(source),
            profile=f'{{"num_samples": {num_samples}}}',
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("manifest.sha256", digest)]
        self._outbox.put_call("a data set", lambda: self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)]))

    def log_metrics(self, step: int, metrics: Mapping[str, float], *, time_s: float | None = None) -> None:
        """Log values at a step. `time_s`: seconds since 1970, now by default. Returns at once, and never raises.

        Logging the same value of the same step and time again changes nothing, so records may be replayed.
        """
        time_ms = int((time.time() if time_s is None else time_s) * 1000)
        self._outbox.put_points([Point(name, float(value), step, time_ms) for name, value in metrics.items()])

    def log_artifact(self, path: str, folder: str | None = None) -> None:
        """Copy a local file into the run's artifacts, under `folder`; read when its turn comes, so leave it there."""
        self._outbox.put_call(path, lambda: self.client.log_artifact(self.run_id, path, folder))

    def log_model(self, path: str, *, name: str, digest: str, step: int = 0) -> None:
        """Log a packaged model, a local folder, as a model of this run; the same weights are logged once.

        digest  of the weights
        """
        self._outbox.put_call("the model", lambda: self._send_model(path, name, digest, step))

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all is delivered; False after `timeout_s` without a success."""
        return self._outbox.flush(timeout_s)

    def finish(self, status: Status, reason: str = "", *, timeout_s: float = 60.0) -> bool:
        """Set the final status; True once the store has everything. Later calls change nothing."""
        if self._status != "RUNNING":
            return True
        self._status = status
        if reason:
            self.set_tags({REASON_TAG: reason})
        end_ms = int(time.time() * 1000)
        self._outbox.put_call(
            f"the status {status}", lambda: self.client.set_terminated(self.run_id, status=status, end_time=end_ms)
        )
        try:
            self._write_identity(status, reason)
        except Exception as error:  # storage may be why the run failed; MLflow is to know it all the same
            logger.warning("%s could not be written: %s", TRACKING_FILE, error)
        delivered = self._outbox.close(timeout_s)
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
            self.finish("FAILED", f"{kind.__name__}: {_first_line(error)}")

    @property
    def location(self) -> str:
        """Where a person looks: the run's page on a server, or the command that shows the local store."""
        if self.uri.startswith(("http://", "https://")):
            return f"{redact_text(self.uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {redact_text(self.uri)}"

    # --- how it gets there

    def _experiment(self, name: str, location: str | None) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException:  # another job has just made it
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {name!r} is deleted; bring it back with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or choose another with tracking.experiment"
            )
        return experiment.experiment_id

    def _start_or_resume(self, name: str) -> tuple[str, bool]:
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{RUN_TAG}` = '{self.identity}'", ViewType.ACTIVE_ONLY, max_results=1
        )
        if found:
            return found[0].info.run_id, True
        tags = {RUN_TAG: self.identity, OWNER_TAG: self._owner, "refinedet.folder": redact_text(self.run_dir)}
        return self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id, False

    def _send_points(self, points: Iterable[Point]) -> None:
        metrics = [
            Metric(point.name, point.value, point.time_ms, point.step)
            for point in points
            if not math.isnan(point.value)  # a hole in the curve, which the store would draw as zero
        ]
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)

    def _send_parameters(self, values: Mapping[str, str]) -> None:
        known = self.client.get_run(self.run_id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), _MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[start : start + _MAX_PARAMS])
        changed = {name: value for name, value in values.items() if known.get(name, value) != value}
        if changed:
            tags = [RunTag(f"resumed_with.{name}", value) for name, value in changed.items()]
            self.client.log_batch(self.run_id, tags=tags[:_MAX_PARAMS])

    def _send_model(self, path: str, name: str, digest: str, step: int) -> None:
        from mlflow.entities import LoggedModelOutput

        query = f"source_run_id = '{self.run_id}' AND tags.`weights.sha256` = '{digest}'"
        for model in self.client.search_logged_models([self.experiment_id], query):
            if str(model.status) == "READY":
                return
        model = self.client.create_logged_model(
            self.experiment_id, name=name, source_run_id=self.run_id, tags={"weights.sha256": digest}
        )
        self.client.log_model_artifacts(model.model_id, path)
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])

    def _write_identity(self, status: str, reason: str = "") -> None:
        storage.write_json(
            storage.join(self.run_dir, TRACKING_FILE),
            {
                "identity": self.identity,
                "uri": redact_text(self.uri),
                "experiment_id": self.experiment_id,
                "run_id": self.run_id,
                "status": status,
                "reason": redact_text(reason),
                "time": time.time(),
                "location": self.location,
            },
        )


def _read_identity(run_dir: str) -> dict[str, Any]:
    path = storage.join(run_dir, TRACKING_FILE)
    try:
        return storage.read_json(path) if storage.exists(path) else {}
    except ValueError:
        logger.warning("%s cannot be read; MLflow starts a new run.", path)
        return {}


def _is_away(error: Exception) -> bool:
    """Whether the store did not answer, or could not, as opposed to having understood and said no."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (408, 429)
    return isinstance(error, ConnectionError | TimeoutError | requests.ConnectionError | requests.Timeout)


def _first_line(error: BaseException | None) -> str:
    text = redact_text(str(error)).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
