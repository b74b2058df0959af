"""A job spec as Kubernetes manifests for KubeRay: a `RayJob` that resumes when it is retried, or a `RayCluster`.

The spec travels in a ConfigMap, whole and without secrets; those come from Kubernetes Secrets, by their names. Every
retry is a new cluster (KubeRay's rule), so the run must live where the next cluster finds it: behind a URI, or on a
volume that is claimed.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import ray
import yaml
from refinedet.pipeline.cluster.submission import (
    HOME_KEY,
    RUN_KEY,
    STOP_MARGIN_S,
    home_of,
    stop_environment,
)
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import dump_spec
from refinedet.pipeline.runs.errors import UserError

SHARED = "/shared"
"""where a claimed volume is mounted"""
_CACHE = "/cache"
_SPEC_FOLDER = "/etc/refinedet"
_MAX_NAME = 47  # KubeRay's limit for a RayJob, so that the names it derives stay legal
_HEAD_CPUS, _HEAD_MEMORY_GIB = 4, 16
_PREPARE_CPUS, _PREPARE_MEMORY_GIB = 8, 16
_SHARED_MEMORY_PER_WORKER_GIB = 8
_SECRETS = ("refinedet-storage", "refinedet-mlflow")  # their keys become environment variables; they may be absent

# How each platform marks its spot nodes; the label is the taint's key too where the platform sets one.
_SPOT_LABELS = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
}


@dataclass(frozen=True)
class KubeRay:
    """What Kubernetes must be told beside the spec.

    image                container image of infra/Dockerfile, pushed where the cluster can pull it
    kind                 "job" ends with its cluster; "cluster" stays, for `refinedet submit`
    queue                Kueue LocalQueue; with one, the size is fixed, as Kueue admits whole jobs; without, Ray scales
    spot                 put the workers on spot nodes, as this platform marks them; the head stays on others
    gpus_per_node        GPUs of one node; training workers are packed so that a pod fills one
    memory_per_worker_gib  of each training worker, its shared memory included
    volume_claim         PersistentVolumeClaim mounted at /shared in every pod
    service_account      for access to storage without keys
    retries              new clusters after a failure; each resumes the run
    """

    image: str
    kind: Literal["job", "cluster"] = "job"
    namespace: str | None = None
    queue: str | None = None
    spot: Literal["gke", "eks", "karpenter"] | None = None
    gpus_per_node: int = 8
    memory_per_worker_gib: int = 32
    volume_claim: str | None = None
    service_account: str | None = None
    retries: int = 3


def render_kuberay(spec: JobSpec, options: KubeRay) -> str:
    """The manifests as YAML, ready for `kubectl apply -f -`. Raises UserError for what could not work there."""
    _check(spec, options)
    name = resource_name(spec.name)
    cluster = _cluster_spec(spec, options, name)
    if options.kind == "cluster":
        documents = [_resource("RayCluster", name, options, cluster)]
    else:
        documents = [
            _config_map(spec, name, options),
            _resource("RayJob", name, options, _job_spec(spec, cluster, options)),
        ]
    return yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)


def resource_name(run: str) -> str:
    """A run's name as Kubernetes allows: lower case, no dots, at most 47 characters; the same for the same run."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    if name != run or len(name) > _MAX_NAME:  # two runs never share a name
        name = f"{name[: _MAX_NAME - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"
    return name


def workers_per_pod(spec: JobSpec, options: KubeRay) -> int:
    """Training workers in one pod: all that a node's GPUs serve, spread evenly over the pods; one without GPUs."""
    workers = spec.cluster.max_workers
    if spec.cluster.placement == "STRICT_SPREAD":
        return 1
    if spec.cluster.placement == "STRICT_PACK":
        return workers
    if not spec.cluster.gpus_per_worker:
        return 1
    fit = max(1, int(options.gpus_per_node / spec.cluster.gpus_per_worker))
    return math.ceil(workers / math.ceil(workers / fit))


def _check(spec: JobSpec, options: KubeRay) -> None:
    for name, value, known in (
        ("kind", options.kind, ("job", "cluster")),
        ("spot", options.spot, (None, *_SPOT_LABELS)),
    ):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(filter(None, known))}, received {value!r}")
    check_spec(spec, "pods", volume=SHARED if options.volume_claim else None)
    gpus = workers_per_pod(spec, options) * spec.cluster.gpus_per_worker
    if gpus > options.gpus_per_node:
        raise UserError(
            f"a pod would need {gpus:g} GPUs, a node has {options.gpus_per_node}; change cluster.placement "
            f"({spec.cluster.placement}), cluster.gpus_per_worker, or --gpus-per-node"
        )


def _resource(kind: str, name: str, options: KubeRay, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": _metadata(name, options, queue=True), "spec": spec}


def _metadata(name: str, options: KubeRay, *, queue: bool = False) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "refinedet", "app.kubernetes.io/instance": name}
    if queue and options.queue:
        labels["kueue.x-k8s.io/queue-name"] = options.queue
    metadata: dict[str, Any] = {"name": name, "labels": labels}
    if options.namespace:
        metadata["namespace"] = options.namespace
    return metadata


def _config_map(spec: JobSpec, name: str, options: KubeRay) -> dict[str, Any]:
    data = spec.data.model_copy(update={"cache_dir": spec.data.cache_dir or _CACHE})
    content = dump_spec(spec.model_copy(update={"data": data}))
    metadata = _metadata(name, options)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"job.yaml": content}}


def _job_spec(spec: JobSpec, cluster: dict[str, Any], options: KubeRay) -> dict[str, Any]:
    return {
        "entrypoint": f"refinedet launch {_SPEC_FOLDER}/job.yaml --address auto",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": stop_environment(spec)}, sort_keys=False),
        # Not the spec too: `refinedet resume` would start on a cluster that KubeRay takes down once this job has ended.
        "metadata": {RUN_KEY: spec.name, HOME_KEY: home_of(spec)},
        "submissionMode": "K8sJobMode",
        "backoffLimit": options.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "rayClusterSpec": cluster,
    }


def _cluster_spec(spec: JobSpec, options: KubeRay, name: str) -> dict[str, Any]:
    scales = options.queue is None
    cluster: dict[str, Any] = {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": scales,
        "headGroupSpec": _head(spec, options, name, scales),
        "workerGroupSpecs": _worker_groups(spec, options, name, scales),
    }
    if scales:
        cluster["autoscalerOptions"] = {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": 120}
    return cluster


def _head(spec: JobSpec, options: KubeRay, name: str, scales: bool) -> dict[str, Any]:
    """The head drives and serves the dashboard; it runs no work, and is not on a spot node."""
    parameters = {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
    if scales:  # tells the job that nodes may still come
        parameters["resources"] = '"{\\"refinedet_autoscaling\\": 1}"'
    resources = {"cpu": str(_HEAD_CPUS), "memory": f"{_HEAD_MEMORY_GIB}Gi"}
    container = _container("head", resources, options)
    container["ports"] += [
        {"name": port, "containerPort": number}
        for port, number in (("gcs", 6379), ("dashboard", 8265), ("client", 10001))
    ]
    volumes = [_memory_volume(4)]
    if options.kind == "job":
        container["volumeMounts"].append({"name": "spec", "mountPath": _SPEC_FOLDER, "readOnly": True})
        volumes.append({"name": "spec", "configMap": {"name": name}})
    template = _template(spec, options, name, container, volumes)
    template["metadata"]["annotations"] = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    return {"rayStartParams": parameters, "template": template}


def _worker_groups(spec: JobSpec, options: KubeRay, name: str, scales: bool) -> list[dict[str, Any]]:
    cluster = spec.cluster
    each = workers_per_pod(spec, options)
    low, high = math.ceil(cluster.min_workers / each), math.ceil(cluster.max_workers / each)
    cpus = math.ceil(each * cluster.cpus_per_worker) + 1  # one for the tasks that prepare and merge
    resources = {"cpu": str(cpus), "memory": f"{each * options.memory_per_worker_gib}Gi"}
    if cluster.gpus_per_worker:
        resources["nvidia.com/gpu"] = str(math.ceil(each * cluster.gpus_per_worker))
    group = _group("training", cpus, resources, spec, options, name, each * _SHARED_MEMORY_PER_WORKER_GIB)
    # Under Kueue the number is fixed; else Ray asks for pods once training begins, and gives idle ones back.
    group |= {"replicas": 0, "minReplicas": 0, "maxReplicas": high} if scales else _fixed(low)
    groups = [group]
    if cluster.gpus_per_worker:  # shards are written before a GPU is paid for
        resources = {"cpu": str(_PREPARE_CPUS), "memory": f"{_PREPARE_MEMORY_GIB}Gi"}
        group = _group("preparation", _PREPARE_CPUS, resources, spec, options, name, 4)
        groups.append(group | ({"replicas": 0, "minReplicas": 0, "maxReplicas": 4} if scales else _fixed(1)))
    return groups


def _fixed(count: int) -> dict[str, int]:
    return {"replicas": count, "minReplicas": count, "maxReplicas": count}


def _group(
    role: str, cpus: int, resources: dict[str, str], spec: JobSpec, options: KubeRay, name: str, shared_memory_gib: int
) -> dict[str, Any]:
    container = _container(role, resources, options)
    cache = spec.data.cache_dir or _CACHE
    container["volumeMounts"].append({"name": "cache", "mountPath": cache})
    size = f"{math.ceil(1.1 * spec.data.cache_bytes / 2**30)}Gi"
    volumes = [_memory_volume(shared_memory_gib), {"name": "cache", "emptyDir": {"sizeLimit": size}}]
    template = _template(spec, options, name, container, volumes)
    pod = template["spec"]
    # A spot node that is taken away, and a stop, both leave this long to save.
    pod["terminationGracePeriodSeconds"] = int(spec.cluster.stop_grace_s) + STOP_MARGIN_S
    tolerations = []
    if options.spot:
        label, value = _SPOT_LABELS[options.spot]
        pod["nodeSelector"] = {label: value}
        tolerations.append({"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    if "nvidia.com/gpu" in resources:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        pod["tolerations"] = tolerations
    group: dict[str, Any] = {"groupName": role, "rayStartParams": {"num-cpus": str(cpus)}, "template": template}
    if spec.cluster.labels and role == "training":
        group["labels"] = dict(spec.cluster.labels)
    return group


def _container(role: str, resources: dict[str, str], options: KubeRay) -> dict[str, Any]:
    limits = {key: value for key, value in resources.items() if key != "cpu"}  # a limit on CPUs only throttles
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": options.image,
        "ports": [{"name": "metrics", "containerPort": 8080}],
        "resources": {"requests": resources, "limits": limits},
        "env": [
            {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "envFrom": [{"secretRef": {"name": secret, "optional": True}} for secret in _SECRETS],
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if options.volume_claim:
        container["volumeMounts"].append({"name": "shared", "mountPath": SHARED})
    return container


def _memory_volume(gib: int) -> dict[str, Any]:
    """Ray's object store and the data loaders live in /dev/shm, of which a container gets 64 MB by default."""
    return {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{gib}Gi"}}


def _template(
    spec: JobSpec, options: KubeRay, name: str, container: dict[str, Any], volumes: list[dict[str, Any]]
) -> dict[str, Any]:
    if options.volume_claim:
        volumes = [*volumes, {"name": "shared", "persistentVolumeClaim": {"claimName": options.volume_claim}}]
    pod: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    return {"metadata": {"labels": {"app.kubernetes.io/name": "refinedet", "refinedet.dev/run": name}}, "spec": pod}
