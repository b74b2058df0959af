"""A detector as a directory that MLflow loads anywhere: our code as code, weights as safetensors, no pickle.

`mlflow.pyfunc.load_model(directory)` works in a process that has the requirements and nothing of this repository. The
detector's sources travel under a name of their own, `refinedet_model_<digest>`. A process may therefore load models of
different code, and have a `model` or a `refinedet` of its own.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import refinedet.model
from refinedet.model.config import RefineDetConfig
from refinedet.model.hub_files import read_exif, read_metadata
from refinedet.pipeline.inference import image_requests
from refinedet.pipeline.runs import storage
from refinedet.pipeline.tracking import stores

stores.configure_mlflow()

import mlflow.pyfunc  # noqa: E402
from mlflow.models import ModelSignature  # noqa: E402
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema  # noqa: E402

_REQUIREMENTS = ("mlflow", "numpy", "opencv-python-headless", "pillow", "safetensors", "timm", "torch", "torchvision")


def package_model(
    directory: str,
    *,
    config: RefineDetConfig,
    weights: str,
    categories: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any] | None = None,
    input_example: np.ndarray | None = None,
    sources: Path | None = None,
) -> str:
    """Write the detector as an MLflow pyfunc model into a local directory, replacing what exists.

    weights        safetensors file or URI with the detector's whole state
    categories     {"id", "name"} of classes 1..C, in that order; ids are the data set's own
    facts          metadata of the model, for example the run's name, step and AP
    input_example  uint8 [H, W, 3] RGB, saved as a PNG in base64
    sources        package of the detector; default: the one that is installed
    returns        the directory
    """
    stores.quiet_mlflow()
    partial = f"{directory}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    example: dict[str, Any] = {}
    if input_example is not None:
        example["input_example"] = {"image": [_base64_png(input_example)]}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on input examples, in colour
        code = _copied_sources(sources or Path(refinedet.model.__file__).parent, Path(scratch))
        content = storage.read_bytes(weights)
        description = os.path.join(scratch, "detector.json")
        storage.write_json(
            description,
            {
                "package": code.name,
                "config": asdict(config),
                "exif": read_exif(read_metadata(content)),
                "categories": [dict(entry) for entry in categories],
                "facts": dict(facts or {}),
            },
        )
        state = os.path.join(scratch, "weights.safetensors")
        storage.write_bytes(state, content)
        mlflow.pyfunc.save_model(
            partial,
            python_model=str(Path(__file__).with_name("served_detector.py")),
            artifacts={"weights": state, "description": description},
            code_paths=[str(code)],
            signature=_signature(),
            **example,
            pip_requirements=_pinned(_REQUIREMENTS),
            metadata={"task": "object-detection", **dict(facts or {})},
        )
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
    return directory


def _copied_sources(package: Path, scratch: Path) -> Path:
    """A copy of a package's sources and the servers' limits, `refinedet_model_<digest of them>`.

    No caches, and no compiled library.
    """
    digest = hashlib.sha256()
    files = {file.relative_to(package): file for ending in ("py", "txt") for file in package.rglob(f"*.{ending}")}
    files[Path("image_requests.py")] = Path(image_requests.__file__)
    for name, file in sorted(files.items()):
        digest.update(f"{name.as_posix()}\0".encode() + file.read_bytes() + b"\0")
    copy = scratch / f"refinedet_model_{digest.hexdigest()[:12]}"
    for name, file in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy / name)
    return copy


def _base64_png(image: np.ndarray) -> str:
    return base64.b64encode(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()).decode()


def _signature() -> ModelSignature:
    """`image` may hold encoded bytes or an array, which no type of MLflow's covers: any."""
    numbers = Array(DataType.double)
    outputs = Schema(
        [
            ColSpec(Array(numbers), "boxes"),
            ColSpec(numbers, "scores"),
            ColSpec(Array(DataType.long), "labels"),
            ColSpec(Array(DataType.string), "names"),
        ]
    )
    params = ParamSchema([ParamSpec("score_threshold", "double", 0.05), ParamSpec("batch_size", "long", 8)])
    return ModelSignature(Schema([ColSpec(AnyType(), "image")]), outputs, params)


def _pinned(names: Sequence[str]) -> list[str]:
    """`name==version` of what is installed, less the local part (+cu130), which no registry has."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
