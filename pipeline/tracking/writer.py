"""Writes to one MLflow run, delivered beside the job by an outbox.

Every write goes through `MlflowClient`, never through MLflow's fluent interface, whose notion of an active run does
not survive several processes.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from refinedet.pipeline.runs.metrics_file import metric_values
from refinedet.pipeline.runs.redaction import parameters, redact_text
from refinedet.pipeline.tracking import stores
from refinedet.pipeline.tracking.outbox import Outbox, Point
from refinedet.pipeline.tracking.run_tags import REASON_TAG

stores.configure_mlflow()

import requests  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

Status = Literal["FINISHED", "FAILED", "KILLED"]
EVALUATIONS = ("validation", "single", "multiscale")
"""first parts of the names of metrics that lie in [0, 1]; COCO writes -1 where there is nothing to measure by"""

_MAX_PARAM_BYTES = 6000  # MLflow's own limits
_MAX_TAG_BYTES = 8000
_MAX_PARAMS = 100
_MAX_PROFILE_BYTES = 60_000


class RunWriter:
    """Parameters, metrics, tags, data sets, artifacts and pictures of one run; returns at once and never raises.

    find  returns the run's id, and makes the run where it does not exist; called by the first delivery
    """

    def __init__(self, client: MlflowClient, find: Callable[[], str]) -> None:
        self.client = client
        self._find = find
        self._run_id = ""
        self._status: str = "RUNNING"
        self._closed = False
        self._outbox = Outbox(self._send_points, is_away=is_away)

    @property
    def run_id(self) -> str:
        """The run's id in MLflow; the first use calls the server."""
        if not self._run_id:
            self._run_id = self._find()
        return self._run_id

    # --- what a job writes

    def log_spec(self, spec: Mapping[str, Any]) -> None:
        """Log the resolved spec as parameters, redacted. What changed since an earlier start becomes a tag."""
        values = {name: clipped(value, _MAX_PARAM_BYTES) for name, value in parameters(spec).items()}
        self._outbox.put_call("the parameters", lambda: self._send_parameters(values))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Facts about the run, such as commit and versions."""
        entries = [RunTag(name, clipped(redact_text(str(value)), _MAX_TAG_BYTES)) for name, value in tags.items()]
        self._outbox.put_call("tags", lambda: self.client.log_batch(self.run_id, tags=entries))

    def set_description(self, text: str) -> None:
        """Markdown that MLflow shows at the head of the run."""
        self.set_tags({"mlflow.note.content": text})

    def log_dataset(
        self,
        name: str,
        digest: str,
        *,
        context: str,
        source: str,
        num_samples: int,
        statistics: Mapping[str, Any] | None = None,
    ) -> None:
        """Log shards as an input of the run.

        digest      of their manifest
        context     "training" or "validation"
        statistics  JSON values, such as objects per class; shown with the data set
        """
        profile = json.dumps({"num_samples": num_samples, **(statistics or {})})
        if len(profile) > _MAX_PROFILE_BYTES:
            profile = json.dumps({"num_samples": num_samples})
        dataset = Dataset(
            name=name,
            digest=digest[:36],  # MLflow's limit; the whole digest is among the tags
            source_type="webdataset",
            source=redact_text(source),
            profile=profile,
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("manifest.sha256", digest)]
        self._outbox.put_call("a data set", lambda: self.client.log_inputs(self.run_id, [DatasetInput(dataset, tags)]))

    def log_metrics(self, step: int, metrics: Mapping[str, float], *, time_s: float | None = None) -> None:
        """Log values at a step; undefined ones are excluded: not finite, or a negative result of an evaluation.

        time_s  seconds since 1970, now by default
        Logging the same value of the same step and time again changes nothing, so records may be replayed.
        """
        time_ms = int((time.time() if time_s is None else time_s) * 1000)
        self._outbox.put_points(
            [Point(name, float(value), step, time_ms) for name, value in metrics.items() if _is_defined(name, value)]
        )

    def log_evaluation(self, step: int, mode: str, content: Mapping[str, Any], *, time_s: float | None = None) -> None:
        """Log the metrics of an evaluation at the step of its weights.

        content  of one mode in `metrics.json`
        Undefined values (None, or COCO's -1 where there is nothing to measure by) are excluded.
        """
        self.log_metrics(step, evaluation_metrics(mode, content), time_s=time_s)

    def log_artifact(self, path: str, directory: str | None = None) -> None:
        """Copy a local file into the run's artifacts, under `directory`; read when its turn comes, so leave it."""
        self._outbox.put_call(path, lambda: self.client.log_artifact(self.run_id, path, directory))

    def log_picture(self, key: str, step: int, image: np.ndarray) -> None:
        """Log uint8 [H, W, 3] RGB; pictures of one key are shown along the steps."""
        name = "/".join(metric_name(part) for part in key.split("/"))
        self._outbox.put_call(
            f"a picture of {key}",
            lambda: self.client.log_image(self.run_id, image, key=name, step=step, synchronous=True),
        )

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until all is delivered; False after `timeout_s` without a success."""
        return self._outbox.flush(timeout_s)

    def end(self, status: Status, reason: str = "") -> None:
        """Queue the final status; a later one changes nothing."""
        if self._status != "RUNNING":
            return
        self._status = status
        if reason:
            self.set_tags({REASON_TAG: reason})
        end_ms = int(time.time() * 1000)
        self._outbox.put_call(
            f"the status {status}", lambda: self.client.set_terminated(self.run_id, status=status, end_time=end_ms)
        )

    def finish(self, status: Status, reason: str = "", *, timeout_s: float = 60.0) -> bool:
        """Set the final status and wait for all deliveries; True once the store has everything."""
        self.end(status, reason)
        return self.close(timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Wait for all deliveries, and leave the status as it is; True once the store has everything."""
        if self._closed:
            return True
        self._closed = True
        return self._outbox.close(timeout_s)

    # --- how it is delivered

    def _send_points(self, points: Iterable[Point]) -> None:
        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
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


def evaluation_metrics(mode: str, content: Mapping[str, Any]) -> dict[str, float]:
    """One mode of `metrics.json` as MLflow metrics: "single/AP", and "single/class AP/NAME" for every class."""
    found = {f"{mode}/{metric_name(name)}": value for name, value in metric_values(content).items()}
    per_class = content.get("per_class")
    for name, row in per_class.items() if isinstance(per_class, Mapping) else ():
        key = f"{mode}/class AP/{metric_name(str(name))}"
        while key in found:  # two names that are one to MLflow
            key += "_"
        found[key] = row.get("AP") if isinstance(row, Mapping) else row
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_defined(name, value)
    }


def _is_defined(name: str, value: float) -> bool:
    return math.isfinite(value) and (value >= 0 or name.partition("/")[0] not in EVALUATIONS)


def metric_name(text: str) -> str:
    """`text` in the characters that MLflow accepts in the name of a metric, and not empty."""
    return re.sub(r"[^\w\- :]", "_", text).strip() or "_"


def is_away(error: Exception) -> bool:
    """Return whether the store did not answer, or could not, as opposed to a refusal of what was sent."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (408, 429)
    return isinstance(error, ConnectionError | TimeoutError | requests.ConnectionError | requests.Timeout)


def clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
