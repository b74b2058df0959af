from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
import yaml
from refinedet.pipeline.cli.jobs import render
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.cluster.render import KubeRay, render_kuberay, resource_name, workers_per_pod
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import load_spec, parse_spec
from refinedet.pipeline.runs.errors import UserError
from typer.testing import CliRunner

from tests.infra.kuberay_definitions import FIELDS, read_definitions
from tests.outside import REPOSITORY, outside

KINDS = ("job", "cluster")
REMOTE = ("runs=s3://bucket/runs", "data.root=s3://bucket/coco", "data.shards=s3://bucket/shards")
JOB = "jobs/coco_refinedet1024_resnet101.yaml"


def _spec(**cluster) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "Coco_1024.ablation",
            "runs": "s3://bucket/runs",
            "data": {
                "format": "coco",
                "root": "s3://bucket/coco",
                "train": [{"images": "train2017", "annotations": "annotations/instances_train2017.json"}],
            },
            "cluster": {"workers": 16, "gpus_per_worker": 1, "cpus_per_worker": 8, **cluster},
        }
    )


def _documents(spec: JobSpec, **options) -> dict[str, dict]:
    text = render_kuberay(spec, KubeRay(image="registry.example/refinedet:1", **options))
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def _groups(document: dict) -> dict[str, dict]:
    cluster = document["spec"].get("rayClusterSpec", document["spec"])
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def _strict(schema):
    """A CRD's OpenAPI schema as JSON schema, in which an unknown field is an error, not dropped in silence."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: value for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    for key in ("properties", "patternProperties"):
        if isinstance(result.get(key), dict):
            result[key] = {name: _strict(value) for name, value in result[key].items()}
    for key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
        if key in result:
            result[key] = _strict(result[key])
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if "properties" in result and "additionalProperties" not in result and not open_ended:
        result["additionalProperties"] = False
    return result


OPTIONS = [
    ({}, {"workers": {"min": 4, "max": 24}, "labels": {"zone": "a"}}),
    ({"queue": "team-a", "spot": "gke", "namespace": "vision", "service_account": "trainer"}, {}),
    ({"volume_claim": "runs", "spot": "karpenter", "retries": 0}, {"gpus_per_worker": 0}),
    ({"network_policy": True, "tls": True, "spot": "eks"}, {"placement": "STRICT_SPREAD"}),
    ({"spot": "aks"}, {"stop_grace_s": 20}),
    ({"spot": "eks", "efa_per_node": 4}, {"placement": "PACK"}),
]


def _every_job() -> list[Path]:
    return [path for path in (REPOSITORY / "jobs").rglob("*.yaml") if path.parent.name not in ("base", "sweeps")]


def render_every_kind() -> dict[str, list[dict]]:
    """By kind, every manifest that the tests of this file hold against KubeRay's definitions."""
    found: dict[str, list[dict]] = {"RayJob": [], "RayCluster": []}
    rendered = [_documents(_spec(**cluster), kind=kind, **options) for options, cluster in OPTIONS for kind in KINDS]
    rendered += [_documents(load_spec(str(job), REMOTE)) for job in _every_job()]
    for documents in rendered:
        for kind in found.keys() & documents.keys():
            found[kind].append(documents[kind])
    return found


@pytest.fixture(scope="session", params=[FIELDS, *outside("schemas", "kuberay")], ids=lambda path: path.stem)
def schemas(request) -> dict[str, jsonschema.Draft7Validator]:
    """KubeRay's own definitions where they are; the fields of them that we use, which the tree holds."""
    path = request.param
    found = {}
    for kind, definition in (read_definitions(path) if path.is_dir() else json.loads(path.read_text())).items():
        schema = _strict(definition)
        schema["properties"]["metadata"] = {"type": "object"}
        found[kind] = jsonschema.Draft7Validator(schema)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("options", "cluster"), OPTIONS)
def test_manifests_are_what_the_definitions_allow(schemas, kind, options, cluster):
    for name, document in _documents(_spec(**cluster), kind=kind, **options).items():
        if name in schemas:
            schemas[name].validate(document)


def test_the_schema_check_would_see_a_misspelt_field(schemas):
    document = _documents(_spec())["RayJob"]
    document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imge"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imge"):
        schemas["RayJob"].validate(document)


def test_values_with_yaml_syntax_stay_values():
    image, labels = "registry.example/a: b #c", {"zone": "{yes: *no}", "rack": "on"}
    text = render_kuberay(_spec(labels=labels), KubeRay(image=image, service_account="'quoted\"", queue="0123"))
    _, job = yaml.safe_load_all(text)
    groups = _groups(job)
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *groups.values()]
    assert {pod["template"]["spec"]["containers"][0]["image"] for pod in pods} == {image}
    assert {pod["template"]["spec"]["serviceAccountName"] for pod in pods} == {"'quoted\""}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "0123"
    assert groups["training"]["labels"] == labels


def test_every_option_is_a_flag_of_the_command(request):
    flags = "--gpus-per-node 4 --memory-per-worker-gib 16 --namespace vision --service-account trainer --retries 0"
    arguments = ["render", "kuberay", str(request.config.rootpath / JOB), *REMOTE, *flags.split()]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    job = next(document for document in yaml.safe_load_all(done.output) if document["kind"] == "RayJob")
    assert (job["metadata"]["namespace"], job["spec"]["backoffLimit"]) == ("vision", 0)
    training = _groups(job)["training"]
    pod = training["template"]["spec"]
    assert (training["maxReplicas"], pod["serviceAccountName"]) == (4, "trainer")
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "4", "memory": "64Gi"}
    assert {field.name for field in fields(KubeRay)} <= set(inspect.signature(render).parameters)


def test_every_job_of_the_repository_can_be_rendered(schemas):
    jobs = _every_job()
    assert len(jobs) > 25
    for job in jobs:
        documents = _documents(load_spec(str(job), REMOTE))
        schemas["RayJob"].validate(documents["RayJob"])
        mounted = parse_spec(yaml.safe_load(documents["ConfigMap"]["data"]["job.yaml"]), source="ConfigMap")
        assert mounted.name == load_spec(str(job)).name


def test_a_retry_finds_the_same_run(schemas):
    first, second = (_documents(_spec()) for _ in range(2))
    assert first == second
    job = first["RayJob"]["spec"]
    assert job["backoffLimit"] == 3
    mounted = parse_spec(yaml.safe_load(first["ConfigMap"]["data"]["job.yaml"]), source="ConfigMap")
    assert (mounted.name, mounted.runs) == ("Coco_1024.ablation", "s3://bucket/runs")
    assert "/etc/refinedet/job.yaml" in job["entrypoint"]


def test_the_grace_of_a_stop_reaches_ray_and_the_pods():
    job = _documents(_spec(stop_grace_s=240))["RayJob"]
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == "270"
    for group in _groups(job).values():
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == 270


def test_a_pod_fills_a_node_and_has_shared_memory():
    job = _documents(_spec())["RayJob"]
    training = _groups(job)["training"]
    (container,) = training["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["requests"]["cpu"] == "65"
    assert "cpu" not in container["resources"]["limits"]
    assert training["maxReplicas"] == 2
    (toleration,) = training["template"]["spec"]["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu", "nodes with GPUs keep other pods away"
    volumes = {volume["name"]: volume for volume in training["template"]["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


@pytest.mark.parametrize(
    ("cluster", "each"),
    [
        ({"workers": 16}, 8),
        ({"workers": 12}, 6),
        ({"workers": 3}, 3),
        ({"workers": 9, "gpus_per_worker": 2}, 3),
        ({"workers": 16, "placement": "STRICT_SPREAD"}, 1),
        ({"workers": 4, "placement": "STRICT_PACK"}, 4),
        ({"workers": 4, "gpus_per_worker": 0}, 1),
        ({"workers": {"min": 2, "max": 16}}, 8),
    ],
)
def test_workers_are_spread_evenly_over_pods(cluster, each):
    assert workers_per_pod(_spec(**cluster), KubeRay(image="x")) == each


def test_with_a_queue_the_size_is_fixed_and_labelled_for_kueue():
    job = _documents(_spec(workers={"min": 8, "max": 16}), queue="team-a")["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    training = _groups(job)["training"]
    assert training["replicas"] == training["minReplicas"] == training["maxReplicas"] == 1


def test_without_a_queue_gpus_come_when_training_begins():
    job = _documents(_spec(workers={"min": 8, "max": 16}))["RayJob"]
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    training = _groups(job)["training"]
    assert (training["minReplicas"], training["maxReplicas"]) == (0, 2)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "refinedet_autoscaling" in head["rayStartParams"]["resources"]


def test_pods_with_gpus_take_the_fabric_of_their_node():
    for spec, expected in ((_spec(), "4"), (_spec(gpus_per_worker=0), None)):
        job = _documents(spec, efa_per_node=4)["RayJob"]
        for role, group in _groups(job).items():
            (container,) = group["template"]["spec"]["containers"]
            for kind in ("requests", "limits"):
                taken = container["resources"][kind].get("vpc.amazonaws.com/efa")
                assert taken == (expected if role == "training" else None), (role, kind)


def test_workers_may_be_on_spot_nodes_and_the_head_is_not():
    job = _documents(_spec(), spot="gke")["RayJob"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "nodeSelector" not in head
    for group in _groups(job).values():
        assert group["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
        assert any(entry["key"] == "cloud.google.com/gke-spot" for entry in group["template"]["spec"]["tolerations"])


@pytest.mark.parametrize(
    ("spot", "cloud", "granted"),
    [("eks", "aws", 120), ("karpenter", "aws", 120), ("gke", "gcp", 30), ("aks", "azure", 30)],
)
def test_spot_pods_watch_for_the_notice_and_have_the_time_that_the_cloud_grants(spot, cloud, granted, request):
    for grace in (20, 240):
        job = _documents(_spec(stop_grace_s=grace), spot=spot)["RayJob"]
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert "lifecycle" not in head
        for group in _groups(job).values():
            pod = group["template"]["spec"]
            assert pod["terminationGracePeriodSeconds"] == min(grace + 30, granted)
            (shell, flag, line) = pod["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
            assert (shell, flag) == ("/bin/sh", "-c")
            assert f"/opt/preemption/drain_on_notice.py --cloud {cloud} " in line
            assert line.endswith("&"), "the hook must end, or the container never counts as started"
    image = (request.config.rootpath / "infra" / "Dockerfile").read_text()
    assert "COPY infra/preemption /opt/preemption" in image.split(" AS node\n")[1].split("\nFROM ")[0]
    on_demand = _groups(_documents(_spec())["RayJob"])["training"]["template"]["spec"]["containers"][0]
    assert "lifecycle" not in on_demand


def test_no_pod_runs_as_root_or_holds_a_secret():
    text = render_kuberay(_spec(), KubeRay(image="x"))
    for document in yaml.safe_load_all(text):
        if document["kind"] == "RayJob":
            cluster = document["spec"]["rayClusterSpec"]
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                pod = group["template"]["spec"]
                assert pod["securityContext"]["runAsNonRoot"]
                (container,) = pod["containers"]
                assert [source["secretRef"]["name"] for source in container["envFrom"]] == [
                    "refinedet-storage",
                    "refinedet-mlflow",
                ]
    assert not re.search(r"password|access_key|token: ", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tracking": {"uri": "http://user:hunter2@mlflow:5000"}}, "looks like a secret"),
        ({"runs": "runs"}, "runs is 'runs', which the next cluster would not find"),
        ({"runs": "/shared/runs"}, "claim a volume"),
        ({"training": {"init_weights": "resnet101.pth"}}, "training.init_weights is 'resnet101.pth', which the next"),
    ],
)
def test_what_could_not_work_is_refused_in_a_sentence(change, said):
    spec = JobSpec.model_validate({**_spec().model_dump(mode="json"), **change})
    with pytest.raises(UserError, match=said) as refused:
        render_kuberay(spec, KubeRay(image="x"))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("options", [{"kind": "pod"}, {"spot": "oracle"}])
def test_an_unknown_choice_is_refused_with_those_there_are(options):
    with pytest.raises(UserError, match="must be one of"):
        render_kuberay(_spec(), KubeRay(image="x", **options))


def test_too_many_gpus_for_a_node_are_refused():
    with pytest.raises(UserError, match="a pod would need 16 GPUs, a node has 8"):
        render_kuberay(_spec(placement="STRICT_PACK"), KubeRay(image="x"))


def test_runs_on_a_claimed_volume_are_found_again():
    spec = JobSpec.model_validate({**_spec().model_dump(mode="json"), "runs": "/shared/runs"})
    text = render_kuberay(spec, KubeRay(image="x", volume_claim="runs"))
    assert text.count('mountPath: "/shared"') == 3


@pytest.mark.parametrize("run", ["quickstart", "Coco_1024.ablation", "a" * 100, "1024", "x-", "A.b", "a.b", "a_b"])
def test_names_are_legal_and_distinct(run):
    name = resource_name(run)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47
    assert resource_name("quickstart") == "quickstart"
    others = {"a.b", "a_b", "A.b", "a-b"} - {run}
    assert name not in {resource_name(other) for other in others}
