"""The architecture as a law: who may import whom, and which package a library belongs to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for top in ("model", "pipeline") for path in (REPOSITORY / top).rglob("*.py"))

# The rooms, lowest first. A room imports from rooms of lower rows; rooms of one row do not import each other.
ROWS = (
    {"pipeline.runs"},
    {"pipeline.config"},
    {"pipeline.data"},
    {"pipeline.inference"},
    {"pipeline.training", "pipeline.evaluation", "pipeline.tracking", "pipeline.report", "pipeline.planning"},
    {"pipeline.cluster"},
    {"pipeline.drills"},
    {"pipeline.cli"},
)
ALLOWED = {"model": set[str]()} | {
    room: {"model"}.union(*ROWS[:index]) for index, row in enumerate(ROWS) for room in row
}
# Steps of the move that are still to be made.
EXCEPTIONS: set[tuple[str, str]] = set()
# Composition roots: a module that is run, not imported, puts rooms together that do not import each other.
ROOTS = {("pipeline.training.__main__", "pipeline.evaluation")}
# A library may be imported by its part alone.
OWNERS = {
    "webdataset": "pipeline.data",
    "deepspeed": "pipeline.training",
    "pycocotools": "pipeline.evaluation",
    "faster_coco_eval": "pipeline.evaluation",
    "mlflow": "pipeline.tracking",
    "ray": "pipeline.cluster",
    "starlette": "pipeline.cluster",
}
MODEL_MAY_IMPORT = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "fsspec",
    "onnx",
    "onnxruntime",
}


def part_of(module: str) -> str | None:
    """`pipeline.data.shards` -> `pipeline.data`; None for what is not ours."""
    names = module.removeprefix("refinedet.").split(".")
    if names[0] == "model":
        return "model"
    return ".".join(names[:2]) if names[0] == "pipeline" else None


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # the detector alone: a packaged model carries it under another name
                assert path.is_relative_to(REPOSITORY / "model"), f"{path}: relative imports hide what is imported"
                continue
            module = node.module or ""
            if module == "refinedet.pipeline":
                found |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    here = part_of(module_of(path))
    if path.parent == REPOSITORY / "pipeline" and path.name == "__init__.py":
        assert not imports_of(path), "pipeline/__init__.py imports nothing, so that each part loads alone"
        return
    assert here in ALLOWED, f"{here} has no import rule"
    for imported in imports_of(path):
        part = part_of(imported)
        if part is not None and part != here:
            allowed = part in ALLOWED[here] or (module_of(path), part) in ROOTS
            assert allowed, f"{module_of(path)} must not import {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_libraries_stay_in_their_part(path: Path) -> None:
    here = part_of(module_of(path))
    for imported in imports_of(path):
        owner = OWNERS.get(imported.split(".")[0])
        drilled = owner == "pipeline.cluster" and here == "pipeline.drills"  # drills start clusters to break them
        assert owner in (None, here) or drilled, f"{module_of(path)} must not import {imported}: it belongs to {owner}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(REPOSITORY / "model")], ids=module_of)
def test_the_detector_stands_alone(path: Path) -> None:
    import sys

    for imported in imports_of(path):
        top = imported.split(".")[0]
        assert top in {"model", *MODEL_MAY_IMPORT, *sys.stdlib_module_names}, f"{module_of(path)} imports {imported}"
