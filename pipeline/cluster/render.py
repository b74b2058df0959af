"""A job spec as Kubernetes manifests for KubeRay: computes the values for the template `infra/kuberay/job.yaml.j2`."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2
import ray
from refinedet.pipeline.cluster.capacity import AUTOSCALING
from refinedet.pipeline.cluster.submission import HOME_KEY, RUN_KEY, STOP_MARGIN_S, home_of, stop_environment
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import dump_spec
from refinedet.pipeline.runs.errors import UserError

SHARED = "/shared"
"""where a claimed volume is mounted"""
_CACHE = "/cache"
_MAX_NAME = 47  # KubeRay's limit for a RayJob, so that the names it derives stay legal

_WATCHER = "/opt/preemption/drain_on_notice.py"
"""in the image: turns a cloud's notice into `ray drain-node`"""
# How each platform marks its spot nodes (the label is the taint's key too where the platform sets one), whose metadata
# announces that one is taken away, and the seconds that the cloud grants from then on.
_SPOT = {
    "gke": ("cloud.google.com/gke-spot", "true", "gcp", 30),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT", "aws", 120),
    "karpenter": ("karpenter.sh/capacity-type", "spot", "aws", 120),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot", "azure", 30),
}


@dataclass(frozen=True)
class KubeRay:
    """Settings for Kubernetes that the spec does not have.

    image                  container image of infra/Dockerfile, pushed where the cluster can pull it
    kind                   "job" ends with its cluster; "cluster" stays, for `refinedet submit`
    queue                  Kueue LocalQueue; with one, the size is fixed, as Kueue admits whole jobs; else Ray scales
    spot                   put the workers on spot nodes, as this platform marks them; the head stays on others
    efa_per_node           Elastic Fabric Adapters of one node, which each training pod with GPUs takes (p4d 4, p5 32)
    gpus_per_node          GPUs of one node; training workers are packed so that a pod fills one
    memory_per_worker_gib  of each training worker, its shared memory included
    volume_claim           PersistentVolumeClaim mounted at /shared in every pod
    service_account        for access to storage without keys
    retries                new clusters after a failure; each resumes the run
    network_policy         refuse connections from outside the cluster but to the dashboard (KubeRay 1.7, feature gate)
    tls                    encrypt what Ray's processes send each other (KubeRay's tlsOptions)
    """

    image: str
    kind: Literal["job", "cluster"] = "job"
    namespace: str | None = None
    queue: str | None = None
    spot: Literal["gke", "eks", "karpenter", "aks"] | None = None
    efa_per_node: int = 0
    gpus_per_node: int = 8
    memory_per_worker_gib: int = 32
    volume_claim: str | None = None
    service_account: str | None = None
    retries: int = 3
    network_policy: bool = False
    tls: bool = False


def render_kuberay(spec: JobSpec, options: KubeRay) -> str:
    """The manifests as YAML, ready for `kubectl apply -f -`. Raises UserError for what could not work there."""
    _check(spec, options)
    name = resource_name(spec.name)
    data = spec.data.model_copy(update={"cache_dir": spec.data.cache_dir or _CACHE})
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(resources.files("refinedet.kuberay").joinpath("job.yaml.j2").read_text())
    return template.render(
        name=name,
        options=options,
        spec=dump_spec(spec.model_copy(update={"data": data})).rstrip(),
        environment=stop_environment(spec),
        job_metadata={RUN_KEY: spec.name, HOME_KEY: home_of(spec)},
        ray_version=ray.__version__,
        autoscaling=AUTOSCALING,
        scales=options.queue is None,
        spot=_SPOT[options.spot] if options.spot else None,
        watcher=_WATCHER,
        grace_s=_grace_s(spec, options),
        head=_head(options, name),
        groups=_worker_groups(spec, options),
        limits=lambda requests: {key: value for key, value in requests.items() if key != "cpu"},
    )


def resource_name(run: str) -> str:
    """A run's name as Kubernetes allows: lower case, no dots, at most 47 characters; the same for the same run."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}"
    if name != run or len(name) > _MAX_NAME:  # two runs never share a name
        name = f"{name[: _MAX_NAME - 7].rstrip('-')}-{hashlib.sha256(run.encode()).hexdigest()[:6]}"
    return name


def _grace_s(spec: JobSpec, options: KubeRay) -> int:
    """Seconds between SIGTERM and the end of a worker's pod: those of a stop, on spot nodes at most the cloud's."""
    of_a_stop = int(spec.cluster.stop_grace_s) + STOP_MARGIN_S
    return min(of_a_stop, _SPOT[options.spot][3]) if options.spot else of_a_stop


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
        ("spot", options.spot, (None, *_SPOT)),
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


def _head(options: KubeRay, name: str) -> dict[str, Any]:
    spec_volume = _volume("spec", "/etc/refinedet", "configMap", {"name": name})
    return {
        "requests": {"cpu": "4", "memory": "16Gi"},
        "volumes": [spec_volume] * (options.kind == "job") + _claimed(options),
    }


def _worker_groups(spec: JobSpec, options: KubeRay) -> list[dict[str, Any]]:
    """The pods that train; where these have GPUs, others that write shards before a GPU is paid for."""
    cluster, each = spec.cluster, workers_per_pod(spec, options)
    low, high = math.ceil(cluster.min_workers / each), math.ceil(cluster.max_workers / each)
    gpus = math.ceil(each * cluster.gpus_per_worker)
    cpus = math.ceil(each * cluster.cpus_per_worker) + 1  # one for the tasks that prepare and merge
    training = _group("training", spec, options, cpus, each * options.memory_per_worker_gib, gpus)
    if gpus and options.efa_per_node:  # AWS requires huge pages, which hold libfabric's buffers
        training["requests"] |= {"vpc.amazonaws.com/efa": str(options.efa_per_node), "hugepages-2Mi": "5120Mi"}
    training |= {"shared_memory": 8 * each, "replicas": (0, 0, high) if options.queue is None else (low,) * 3}
    preparation = _group("preparation", spec, options, cpus=8, memory_gib=16, gpus=0)
    preparation |= {"shared_memory": 4, "replicas": (0, 0, 4) if options.queue is None else (1,) * 3}
    return [training | {"labels": cluster.labels}, preparation | {"labels": {}}][: 2 if gpus else 1]


def _group(role: str, spec: JobSpec, options: KubeRay, cpus: int, memory_gib: int, gpus: int) -> dict[str, Any]:
    requests = {"cpu": str(cpus), "memory": f"{memory_gib}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    size = {"sizeLimit": f"{math.ceil(1.1 * spec.data.cache_bytes / 2**30)}Gi"}
    cache = _volume("cache", spec.data.cache_dir or _CACHE, "emptyDir", size)
    return {"role": role, "requests": requests, "volumes": [cache, *_claimed(options)]}


def _claimed(options: KubeRay) -> list[dict[str, Any]]:
    claim = {"claimName": options.volume_claim}
    return [_volume("shared", SHARED, "persistentVolumeClaim", claim)] if options.volume_claim else []


def _volume(name: str, path: str, kind: str, source: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "path": path, "kind": kind, "source": source}
