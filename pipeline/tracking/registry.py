"""Packaged models in MLflow: logged with their metrics, registered, and `champion` where they beat the last one."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from refinedet.pipeline.tracking import stores

stores.configure_mlflow()

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import LoggedModelOutput, Metric  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

logger = logging.getLogger(__name__)

CHAMPION = "champion"
WEIGHTS_TAG = "weights.sha256"
DATA_TAG = "data.sha256"
SCORE_TAG = "score"
SCORED_BY = ("single/AP", "single/mAP", "multiscale/AP", "multiscale/mAP")
"""the first of these metrics that a model has is its score"""


@dataclass(frozen=True)
class PackagedModel:
    path: str
    """local directory, as `package_model` writes it"""
    name: str
    digest: str
    """of the weights"""
    step: int
    metrics: dict[str, float]
    data_digest: str
    """of the data that the metrics were measured on"""
    times_s: dict[str, float] = field(default_factory=dict)
    """mode -> when its metrics were logged to the run; a point of the same time is not logged twice"""

    def time_ms(self, metric: str) -> int:
        return int(1000 * self.times_s.get(metric.partition("/")[0], time.time()))

    @property
    def score(self) -> tuple[str, float] | None:
        return next(((name, self.metrics[name]) for name in SCORED_BY if name in self.metrics), None)


def log_and_register(client: MlflowClient, experiment_id: str, run_id: str, model: PackagedModel) -> None:
    """Log a model with its metrics and register it; what an earlier call has done is not done again."""
    model_id = _logged(client, experiment_id, run_id, model)
    _register(client, run_id, model_id, model)


def _logged(client: MlflowClient, experiment_id: str, run_id: str, model: PackagedModel) -> str:
    query = f"source_run_id = '{run_id}' AND tags.`{WEIGHTS_TAG}` = '{model.digest}'"
    for found in client.search_logged_models([experiment_id], query):
        if str(found.status) == "READY":
            return found.model_id
    created = client.create_logged_model(
        experiment_id, name=_entity_name(model.name), source_run_id=run_id, tags={WEIGHTS_TAG: model.digest}
    )
    client.log_model_artifacts(created.model_id, model.path)
    if model.metrics:
        client.log_batch(
            run_id,
            metrics=[
                Metric(name, value, model.time_ms(name), model.step, model_id=created.model_id)
                for name, value in model.metrics.items()
            ],
        )
    client.finalize_logged_model(created.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(created.model_id, model.step)])
    return created.model_id


def _register(client: MlflowClient, run_id: str, model_id: str, model: PackagedModel) -> None:
    name = _entity_name(model.name)
    try:
        client.create_registered_model(name, description="RefineDet++, packaged for mlflow.pyfunc.load_model")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}'")
    version = next((one.version for one in known if one.tags.get(WEIGHTS_TAG) == model.digest), None)
    if version is None:
        tags = {WEIGHTS_TAG: model.digest, DATA_TAG: model.data_digest}
        description = f"Run {client.get_run(run_id).info.run_name}, step {model.step}"
        if model.score:
            tags[SCORE_TAG] = f"{model.score[0]}={model.score[1]:.6f}"
            description += f": {model.score[0]} {model.score[1]:.3f}"
        # A server resolves the model itself; a database's store would look for it at MLflow's global tracking URI.
        served = client.tracking_uri.startswith(("http://", "https://"))
        source = f"models:/{model_id}" if served else client.get_logged_model(model_id).artifact_location
        created = client.create_model_version(
            name, source=source, run_id=run_id, tags=tags, model_id=model_id, description=description
        )
        version = created.version
    if _beats_champion(client, name, model):
        client.set_registered_model_alias(name, CHAMPION, str(version))


def _beats_champion(client: MlflowClient, name: str, model: PackagedModel) -> bool:
    """Return whether the model has a score, and no champion has as high a one by the same metric on the same data."""
    if model.score is None:
        return False
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return True
        raise
    metric, _, value = champion.tags.get(SCORE_TAG, "").partition("=")
    if champion.tags.get(DATA_TAG) != model.data_digest or metric != model.score[0]:
        logger.info("%s keeps its champion: it was measured on other data, or by another metric.", name)
        return False
    return model.score[1] > float(value)


def _entity_name(text: str) -> str:
    """MLflow refuses some characters in the name of a model."""
    return "".join("-" if character in "/:.%'\"" else character for character in text) or "refinedet"
