"""The one check of a job spec: what it refuses, without data, weights or a cluster."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.runs.errors import UserError


def make_spec(**changes: Any) -> JobSpec:
    values: dict[str, Any] = {"name": "r", "runs": "s3://b/runs", "data": {"format": "shapes", "train": [{"count": 4}]}}
    return JobSpec.model_validate(values | changes)


REFUSED = {
    "a batch that leaves workers without an image": (
        {"training": {"global_batch": 15}, "cluster": {"workers": 16}},
        "training.global_batch 15 has fewer images than the 16 workers",
    ),
    "an elastic size that the batch is too small for": (
        {"training": {"global_batch": 4}, "cluster": {"workers": {"min": 1, "max": 5}}},
        "training.global_batch 4 has fewer images than the 5 workers",
    ),
    "nothing to train on": ({"data": {"format": "shapes", "train": []}}, "data.train is empty"),
    "a secret": (
        {"tracking": {"uri": "http://user:hunter2@mlflow:5000"}},
        "tracking.uri holds what looks like a secret",
    ),
    "passes of another model's size": ({"multiscale": {"recipe": "coco512"}}, "models of input size 512, received"),
    "a size between strides": ({"training": {"input_sizes": [320, 350]}}, "coarsest stride 64, received [320, 350]"),
    "no passes": ({"multiscale": {}}, "multiscale has neither `recipe` nor `passes`"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["here", "cluster", "pods"])
def test_what_cannot_work_is_refused_everywhere(name: str, place: Literal["here", "cluster", "pods"]) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(UserError) as refused:
        check_spec(make_spec(**changes), place)
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert "hunter2" not in message


RELATIVE = [
    ({"runs": "runs"}, "runs"),
    ({"data": {"format": "coco", "root": "coco", "train": [{"images": "i", "annotations": "a"}]}}, "data.root"),
    ({"data": {"format": "shapes", "shards": "shards", "train": [{"count": 4}]}}, "data.shards"),
    ({"training": {"init_weights": "w.pth"}}, "training.init_weights"),
]


@pytest.mark.parametrize(("changes", "key"), RELATIVE)
def test_a_relative_path_means_nothing_on_a_cluster(changes: dict, key: str) -> None:
    check_spec(make_spec(**changes))
    with pytest.raises(UserError, match=f"{key} is the relative path"):
        check_spec(make_spec(**changes), "cluster")
    with pytest.raises(UserError, match=f"{key} is .* which the next cluster would not find"):
        check_spec(make_spec(**changes), "pods", volume="/shared")


def test_timms_weights_are_no_path() -> None:
    named = {"training": {"init_weights": "timm"}}
    check_spec(make_spec(**named), "cluster")
    check_spec(make_spec(**named, runs="s3://runs"), "pods")
    for backbone in ("vgg16_reduced", "resnext152_32x4d"):
        with pytest.raises(UserError, match="timm has no trained weights"):
            check_spec(make_spec(**named, model={"backbone": backbone}))


def test_pods_find_what_is_on_their_volume_and_nothing_else_of_a_disk() -> None:
    check_spec(make_spec(runs="/data/runs"), "cluster")
    check_spec(make_spec(runs="/shared/runs"), "pods", volume="/shared")
    for runs, volume in (("/shared/runs", None), ("/data/runs", "/shared"), ("/shared-elsewhere/runs", "/shared")):
        with pytest.raises(UserError, match="would not find"):
            check_spec(make_spec(runs=runs), "pods", volume=volume)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"runs": "s3://key:hunter2@bucket/runs"}, "runs"),
        (
            {
                "data": {
                    "format": "coco",
                    "root": "https://host/coco?sig=hunter2",
                    "train": [{"images": "i", "annotations": "a"}],
                }
            },
            "data.root",
        ),
        ({"cluster": {"labels": {"token": "hunter2"}}}, "cluster.labels.token"),
    ],
)
def test_a_secret_is_named_by_its_key_and_never_repeated(changes: dict, key: str) -> None:
    with pytest.raises(UserError) as refused:
        check_spec(make_spec(**changes))
    assert str(refused.value).startswith(f"{key} holds what looks like a secret")
    assert "hunter2" not in str(refused.value)
