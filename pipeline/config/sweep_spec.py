"""A sweep: variants of one job, each with several seeds, and what is compared between them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, model_validator
from refinedet.pipeline.config.section import NonNegativeInt, PositiveInt, Section
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_files import (
    apply_override,
    explain_faults,
    merge_values,
    parse_spec,
    read_with_bases,
    read_yaml,
)
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


class Claim(Section):
    """A claim: `better` is above `worse`."""

    better: str
    """a variant"""
    worse: str
    """a variant"""
    paper: float | None = None
    """difference in the paper, in points of a hundred"""


class SweepSpec(Section):
    """Variants of a job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """of the directory that holds the runs, below the job's `runs`"""
    job: str
    """job spec, relative to the sweep's file"""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """`seed` of the job, one run each for every variant"""
    at_once: PositiveInt = 1
    """runs at the same time; the cluster must hold the workers of all"""
    variants: dict[str, dict[str, Any]]
    """keys of the job spec that each variant changes"""
    compare: tuple[Claim, ...] = ()
    """claims, each judged on the differences of runs with the same seed"""

    @model_validator(mode="after")
    def _names(self) -> SweepSpec:
        if not self.variants or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a sweep needs at least one variant, and seeds that differ")
        for variant in self.variants:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", variant):
                raise ValueError(f"a variant's name is made of letters, digits and _ . -, received {variant!r}")
        for claim in self.compare:
            for variant in (claim.better, claim.worse):
                if variant not in self.variants:
                    raise ValueError(f"`compare` names {variant!r}, which is no variant ({', '.join(self.variants)})")
        return self


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    variant: str
    seed: int
    spec: JobSpec


@dataclass(frozen=True)
class Sweep:
    """A sweep with the spec of each of its runs, seed by seed, so that a sweep that was stopped can be compared."""

    spec: SweepSpec
    directory: str
    """of the runs"""
    runs: tuple[SweepRun, ...]


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep.

    path       a YAML file or a URI
    overrides  "training.epochs=3" and the like, of every run's job spec
    Raises UserError for whatever is wrong with it, or with the spec of a run.
    """
    try:
        spec = SweepSpec.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(explain_faults(error, SweepSpec))) from None
    job = read_with_bases(os.path.join(os.path.dirname(path), spec.job))
    for override in overrides:
        apply_override(job, override)
    directory = storage.join(str(job.get("runs", "runs")), spec.name)
    job = merge_values({"data": {"shards": storage.join(directory, "shards")}}, job)
    return Sweep(spec, storage.absolute(directory), tuple(_runs(path, spec, directory, job)))


def _runs(path: str, spec: SweepSpec, directory: str, job: Mapping[str, Any]) -> Iterator[SweepRun]:
    for seed in spec.seeds:
        for variant, changes in spec.variants.items():
            own = {"name": f"{variant}-{seed}", "runs": directory, "seed": seed}
            values = merge_values(merge_values(job, changes), own)
            yield SweepRun(variant, seed, parse_spec(values, source=f"{path}, variant {variant}"))
