"""`refinedet doctor`: conditions of this machine and installation, with remedies.

Torch is loaded inside functions, since the doctor also runs where it is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass

from refinedet.pipeline.runs.environment import commit, package_versions, processor


@dataclass(frozen=True)
class Condition:
    """One line. `state`: "ok", "optional" (works without) or "missing" (does not)."""

    name: str
    state: str
    text: str

    @property
    def mark(self) -> str:
        return {"ok": "✓", "optional": "–", "missing": "✗"}[self.state]

    @property
    def needed(self) -> bool:
        return self.state == "missing"


def check_installation() -> list[Condition]:
    """Examine this machine without starting anything."""
    versions = package_versions()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings = [
        Condition("machine", "ok", f"{processor()}, {cores} cores, {memory:.0f} GiB, Python {versions['python']}")
    ]
    if found := commit():
        findings.append(Condition("commit", "ok", found))
    for name in ("torch", "torchvision", "timm", "deepspeed", "ray", "webdataset", "pycocotools", "mlflow"):
        if name in versions:
            findings.append(Condition(name, "ok", versions[name]))
        else:
            findings.append(Condition(name, "missing", "not installed; run `make install`"))
    if "torch" in versions:
        findings += [_cuda(), _cpu_precision(), _operators()]
    findings.append(_apex(versions))
    for name, purpose in (("s3fs", "s3://"), ("gcsfs", "gs://")):
        present = importlib.util.find_spec(name) is not None
        text = f"{purpose} URIs work" if present else f"not installed; {purpose} URIs need it (pip install {name})"
        findings.append(Condition(name, "ok" if present else "optional", text))
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    findings.append(Condition("disk", "ok" if free > 5 else "optional", f"{free:.0f} GiB free here"))
    return findings


def _cuda() -> Condition:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return Condition("CUDA", "optional", f"no device; training runs on the CPU ({built})")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Condition("CUDA", "ok", f"{torch.version.cuda}: {len(names)} x {names[0]}")


def _cpu_precision() -> Condition:
    import torch
    from refinedet.pipeline.inference.precision import computes_bf16

    if computes_bf16(torch.device("cpu")):
        return Condition("CPU bf16", "ok", "native; precision auto trains in bf16 here")
    return Condition("CPU bf16", "optional", "emulated on this processor; precision auto trains in fp32 on the CPU")


def _operators() -> Condition:
    import torch
    from refinedet.model.ops.library import describe_fault_on_gpu, describe_library

    found = describe_library()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if fault := describe_fault_on_gpu(index):
            return Condition("operators", "missing", fault)
    return Condition("operators", "ok" if found.loaded else "optional", found.reason)


def _apex(versions: dict[str, str]) -> Condition:
    if "apex" not in versions:
        return Condition(
            "apex", "optional", "not installed; only optimizer apex_sgd needs NVIDIA apex, built from source"
        )
    if importlib.util.find_spec("apex.optimizers") is None:
        return Condition("apex", "optional", "the installed package named apex is not NVIDIA's; uninstall it")
    return Condition("apex", "ok", versions["apex"])
