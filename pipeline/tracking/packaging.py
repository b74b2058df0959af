"""A detector as a folder that MLflow loads anywhere: our code as code, weights as safetensors, no pickle.

`mlflow.pyfunc.load_model(folder)` works in a process that has the requirements and nothing of this repository.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import refinedet.model as detector_package
from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.runs import storage
from refinedet.pipeline.tracking import stores

stores.configure_mlflow()

import mlflow.pyfunc  # noqa: E402
from mlflow.models import ModelSignature  # noqa: E402
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema  # noqa: E402

_REQUIREMENTS = ("mlflow", "numpy", "opencv-python-headless", "safetensors", "timm", "torch", "torchvision")


def package_model(
    folder: str,
    *,
    config: RefineDetConfig,
    weights: str,
    categories: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Write the detector as an MLflow pyfunc model into a local folder, replacing what is there. Returns the folder.

    weights     safetensors file or URI with the detector's whole state
    categories  {"id", "name"} of classes 1..C, in that order; ids are the data set's own
    facts       kept with the model, for example the run's name, step and AP
    """
    stores.quiet_mlflow()
    partial = f"{folder}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on input examples, in colour
        description = os.path.join(scratch, "detector.json")
        storage.write_json(
            description,
            {"config": asdict(config), "categories": [dict(entry) for entry in categories], "facts": dict(facts or {})},
        )
        state = os.path.join(scratch, "weights.safetensors")
        storage.write_bytes(state, storage.read_bytes(weights))
        mlflow.pyfunc.save_model(
            partial,
            python_model=str(Path(__file__).with_name("served_detector.py")),
            artifacts={"weights": state, "description": description},
            code_paths=[str(Path(_sources_of(detector_package, scratch)).parent)],
            signature=_signature(),
            pip_requirements=_pinned(_REQUIREMENTS),
            metadata={"task": "object-detection", **dict(facts or {})},
        )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder


def _sources_of(package: Any, scratch: str) -> str:
    """A copy of a package's sources: no caches, and no compiled library, which other machines could not load."""
    copy = os.path.join(scratch, *package.__name__.split("."))
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.so.*", "*.pyd", "*.dylib")
    shutil.copytree(os.path.dirname(package.__file__), copy, ignore=ignored)
    return copy


def _signature() -> ModelSignature:
    """`image` may hold encoded bytes or an array, which no type of MLflow's says: any."""
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
