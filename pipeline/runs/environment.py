"""Description of this machine and installation, for `refinedet doctor`, the report and MLflow."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "ray",
    "deepspeed",
    "webdataset",
    "mlflow",
    "pycocotools",
    "faster-coco-eval",
    "opencv-python-headless",
    "numpy",
    "apex",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that matter; those not installed are excluded."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of this checkout, marked where files differ from it; empty outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short=12", "HEAD")
    return f"{found}+changes" if found and git("status", "--porcelain", "--untracked-files=no") else found


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Any]:
    """Versions, commit and hardware of this machine, as JSON."""
    return {
        "commit": commit(),
        "versions": package_versions(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }
