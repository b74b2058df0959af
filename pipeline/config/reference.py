"""The job spec key by key, as Markdown: docs/job-spec.md is made of it, and a test compares them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from refinedet.pipeline.config.spec import JobSpec

_INTRODUCTION = """# The job spec

Every key of a job's YAML file, made by `refinedet schema --format markdown` from the schema that checks it. A spec may
build on another (`base: FILE`). On the command line a key reads `training.epochs=3`. Unknown keys are refused, with the
nearest known one.
"""


def describe_spec() -> str:
    """The reference in Markdown: a table of keys for every section."""
    schema = JobSpec.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    parts = [_INTRODUCTION, "## The top level", *_table(schema, {})]
    nested: list[tuple[str, str]] = []
    for key, field in schema["properties"].items():
        for name in _references(field):
            nested.append((key, name))
    seen: set[str] = set()
    while nested:
        path, name = nested.pop(0)
        if name in seen:
            continue
        seen.add(name)
        definition = definitions[name]
        introduction, texts = _split_description(definition.get("description", ""))
        parts += ["", f"## `{path}`", *(["", introduction] if introduction else []), *_table(definition, texts)]
        for key, field in definition.get("properties", {}).items():
            nested += [(f"{path}.{key}", inner) for inner in _references(field)]
    return "\n".join(parts).rstrip() + "\n"


def _table(definition: Mapping[str, Any], texts: Mapping[str, str]) -> Iterator[str]:
    required = definition.get("required", ())
    yield from ("", "| key | values | default | meaning |", "|---|---|---|---|")
    for key, field in definition["properties"].items():
        default = "required" if key in required else _default(field)
        meaning = field.get("description") or texts.get(key, "")
        yield f"| `{key}` | {_values(field)} | {default} | {_cell(meaning)} |"


def _default(field: Mapping[str, Any]) -> str:
    if list(_references(field)) and field.get("default") not in (None, []):
        return ""
    if "default" not in field or field["default"] is None:
        return ""
    return f"`{json.dumps(field['default'])}`"


def _values(field: Mapping[str, Any]) -> str:
    """The type, the bounds or the literals of a field, in words."""
    if "$ref" in field:
        return "a section, below"
    if "anyOf" in field:
        return " or ".join(_values(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_values(field['items'])}" if isinstance(field.get("items"), dict) else "list"
    names = {"integer": "whole number", "boolean": "true or false", "string": "text", "object": "mapping"}
    kind = str(field.get("type", "any"))
    bounds = [
        f"{sign} {field[bound]:g}"
        for bound, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if bound in field
    ]
    return f"{names.get(kind, kind)} {', '.join(bounds)}".strip()


def _references(field: Any) -> Iterator[str]:
    """Names of the sections that a field holds."""
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rpartition("/")[2]
        for name in ("anyOf", "items", "allOf"):
            yield from _references(field.get(name))
    elif isinstance(field, list):
        for one in field:
            yield from _references(one)


def _split_description(text: str) -> tuple[str, dict[str, str]]:
    """The prose of a docstring, and the texts of its fields, which are aligned in columns below it."""
    introduction, _, rows = text.partition("\n\n")
    texts: dict[str, str] = {}
    keys: list[str] = []
    for line in rows.splitlines():
        found = re.match(r"(\w[\w, ]*?)\s{2,}(\S.*)", line)
        if found:
            keys = found[1].split(", ")
            texts |= dict.fromkeys(keys, found[2])
        elif keys:
            texts |= {key: f"{texts[key]} {line.strip()}" for key in keys}
    return " ".join(introduction.split()), texts


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
