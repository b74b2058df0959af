"""Reading job specs: YAML with `base:` inheritance and `key=value` overrides, to a checked `JobSpec` and back."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "jobs"
"""jobs/ of the checkout, or of the installed package"""
_MAX_BASES = 8
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def load_spec(job: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job spec.

    job        a YAML file, an fsspec URI, or the name of a job that ships ("quickstart"); its `base:`, a path relative
               to it, is read first and merged below it
    overrides  "training.epochs=3" and the like; values are YAML
    Raises UserError for whatever is wrong with them, naming the key, what was received and the remedy.
    """
    path = _find(job)
    values = read_with_bases(path)
    for override in overrides:
        apply_override(values, override)
    return parse_spec(values, source=path)


def parse_spec(values: Mapping[str, Any], source: str) -> JobSpec:
    """Check plain values, for example a parsed `spec.yaml`."""
    try:
        return JobSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(explain_faults(error, JobSpec))) from None


def dump_spec(spec: JobSpec) -> str:
    """The resolved spec as YAML; `parse_spec` of it gives an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def _find(job: str) -> str:
    """The file of a job that ships, where `job` is its name and no file here; else `job`."""
    shipped = SHIPPED / f"{job.removesuffix('.yaml')}.yaml"
    return str(shipped) if not os.path.exists(job) and "://" not in job and shipped.is_file() else job


def read_with_bases(path: str, depth: int = 0) -> dict[str, Any]:
    """Plain values of a job spec, merged over those of its `base:`."""
    if depth > _MAX_BASES:
        raise UserError(
            f"{path}: more than {_MAX_BASES} files inherit from one another through `base:`; break the loop."
        )
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: `base` must be the path of another job spec, received {base!r}.")
    return merge_values(read_with_bases(os.path.join(os.path.dirname(path), base), depth + 1), values)


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file or URI that holds a mapping; UserError for anything else."""
    try:
        values = yaml.safe_load(storage.read_bytes(path).decode())
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise UserError(f"There is no job spec {path!r}; give a file, a URI, or a job that ships: {names}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    except Exception as error:  # a library of remote storage raises errors of its own, or is missing
        raise UserError(f"The job spec {path!r} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, received {type(values).__name__}.")
    return values


def merge_values(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; everything else, lists too, is replaced."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge_values(merged[key], value)
        else:
            merged[key] = value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the key of "training.epochs=3" in `values`, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"An override reads key=value, as in training.epochs=3; received {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"The value of the override {override!r} is not YAML; quote it.") from None
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    values[last] = value


def explain_faults(error: ValidationError, top: type[BaseModel]) -> list[str]:
    """One clause a key, unknown keys first: a misspelt key often makes another one missing.

    Where a key takes one of several types, pydantic reports on each; only the one that was meant is explained.
    """
    faults = sorted(error.errors(), key=lambda fault: fault["type"] not in _UNKNOWN_KEY)
    clauses: dict[str, str] = {}
    for fault in faults:
        if fault["type"] == "int_type" and isinstance(fault.get("input"), (dict, list, tuple)) and len(faults) > 1:
            continue
        clauses.setdefault(_key(fault), _explain(fault, top))
    return list(clauses.values())


def _key(fault: Any) -> str:
    """Dotted key of a fault, without pydantic's names for the members of a union."""
    return ".".join(part for part in map(str, fault["loc"]) if re.fullmatch(r"[a-z0-9_]+", part))


def _explain(fault: Any, top: type[BaseModel]) -> str:
    """One pydantic fault as a clause: what, received, remedy."""
    location = [str(part) for part in fault["loc"]]
    key = _key(fault)
    kind, received = fault["type"], fault.get("input")
    if kind in _UNKNOWN_KEY:
        known = _keys_beside(location, top)
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"there is no key `{key}`; {remedy}"
    if kind == "missing":
        return f"`{key}` is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"`{key}`: {message}" if key and key not in message else message
    return f"`{key}`: {message[0].lower()}{message[1:]}, received {received!r}"


def _keys_beside(location: Sequence[str], top: type[BaseModel]) -> list[str]:
    """The keys known where `location` ends, found by walking the types below `top`."""
    section: Any = top
    for part in location[:-1]:
        fields = _fields(section)
        if part in fields:
            section = fields[part]
    return sorted(_fields(section))


def _fields(section: Any) -> dict[str, Any]:
    candidates = [section, *getattr(section, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return {name: field.annotation for name, field in candidate.model_fields.items()}
        if hasattr(candidate, "__dataclass_fields__"):
            return dict.fromkeys(candidate.__dataclass_fields__)
    for candidate in candidates:
        if inner := getattr(candidate, "__args__", None):
            return _fields(inner[0])
    return {}
