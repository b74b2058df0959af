"""Launch, submit, plan and render refuse the same specs in the same words."""

from __future__ import annotations

from typing import Any

import pytest
from refinedet.pipeline.cluster import jobs_client
from refinedet.pipeline.cluster.jobs_client import JobsClient
from refinedet.pipeline.cluster.launch import launch
from refinedet.pipeline.cluster.render import KubeRay, render_kuberay
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.planning.plan import print_plan
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.progress import ProgressDisplay


def refusal(command: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        command(*arguments, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"global_batch": 15}, "cluster": {"workers": 16}},
        {"data": {"format": "shapes", "train": []}},
        {"tracking": {"uri": "http://user:hunter2@mlflow:5000"}},
        {"multiscale": {"recipe": "coco512"}},
    ],
    ids=["small-batch", "no-training-data", "secret", "recipe"],
)
def test_one_refusal_for_every_command(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"name": "r", "runs": "s3://bucket/runs", "data": {"format": "shapes", "train": [{"count": 4}]}}
    spec = JobSpec.model_validate(values | changes)
    monkeypatch.setattr(jobs_client, "connect", lambda address: None)  # a refused job calls no cluster
    with ProgressDisplay() as display:
        said = refusal(launch, spec, display=display)
    assert refusal(JobsClient("http://head:8265").submit, spec) == said
    assert refusal(print_plan, spec) == said
    assert refusal(render_kuberay, spec, KubeRay(image="i")) == said
