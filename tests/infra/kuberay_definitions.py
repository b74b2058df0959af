"""The fields of KubeRay's resources that our manifests set, with their types, in `tests/golden/kuberay_fields.json`.

    python -m tests.infra.kuberay_definitions DIRECTORY

DIRECTORY holds KubeRay's own definitions, `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml`. They have 2 MB; what is
kept of them is what a field of ours is checked by. Run it again when a manifest sets a field that it did not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.outside import REPOSITORY

FIELDS = REPOSITORY / "tests" / "golden" / "kuberay_fields.json"
FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
_KEPT = ("type", "required", "enum", "minimum", "maximum", "pattern", "additionalProperties", "anyOf", "oneOf")


def read_definitions(folder: Path) -> dict[str, dict[str, Any]]:
    """The schema of each kind, by KubeRay's own files."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = {}
    for kind, file in FILES.items():
        definition = yaml.load((folder / file).read_text(), Loader=loader)
        version = next(entry for entry in definition["spec"]["versions"] if entry["name"] == "v1")
        found[kind] = version["schema"]["openAPIV3Schema"]
    return found


def keep_fields_of(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The schema without the fields that none of the values has."""
    kept = {key: schema[key] for key in _KEPT if key in schema}
    kept |= {key: value for key, value in schema.items() if key.startswith("x-kubernetes") and value is True}
    if "properties" in schema:
        names = {name for value in values for name in value}
        kept["properties"] = {
            name: keep_fields_of(field, [value[name] for value in values if name in value])
            for name, field in sorted(schema["properties"].items())
            if name in names
        }
    if "items" in schema:
        kept["items"] = keep_fields_of(schema["items"], [item for value in values for item in value])
    return kept


def write_fields(folder: Path) -> None:
    from tests.infra.test_kuberay import render_every_kind

    rendered = render_every_kind()
    fields = {kind: keep_fields_of(schema, rendered[kind]) for kind, schema in read_definitions(folder).items()}
    FIELDS.write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    write_fields(Path(sys.argv[1]))
