"""Results of a sweep: mean and spread of each variant, and each claim judged by differences at equal seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refinedet.pipeline.config.sweep_spec import Claim, Sweep
from refinedet.pipeline.report.result_tables import MODE_TITLES
from refinedet.pipeline.report.run_data import RunFolder, read_run
from refinedet.pipeline.report.training_charts import ledger_total
from refinedet.pipeline.report.verdict import headline
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class Summary:
    """Values over seeds. `spread` is their standard deviation, None for one value."""

    mean: float
    spread: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class VariantResult:
    """One variant.

    scores   by metric and scale, as "AP, single scale"
    seconds  of training, mean
    done     runs that were evaluated
    """

    variant: str
    scores: dict[str, Summary]
    seconds: float | None
    done: int


@dataclass(frozen=True)
class ClaimResult:
    """A claim `better > worse` in one metric; where there is AP50, the measure of the paper's ablations, in that too.

    difference  over seeds that both have, in points of a hundred
    paper       the paper's, in points of a hundred
    verdict     "holds" or "contradicted" where the mean lies further from 0 than the spread; else "undecided"
    """

    claim: str
    metric: str
    difference: Summary | None
    paper: float | None
    verdict: str


@dataclass(frozen=True)
class SweepResult:
    variants: tuple[VariantResult, ...]
    claims: tuple[ClaimResult, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_sweep(sweep: Sweep) -> SweepResult:
    """Read what there is of a sweep; UserError where no run was evaluated yet."""
    found: dict[str, dict[int, RunFolder]] = {variant: {} for variant in sweep.spec.variants}
    for run in sweep.runs:
        path = storage.join(sweep.directory, run.spec.name)
        if storage.exists(storage.join(path, "metrics.json")):
            found[run.variant][run.seed] = read_run(path)
    scores = {variant: _scores(by_seed) for variant, by_seed in found.items()}
    if not any(scores.values()):
        raise UserError(f"No run in {sweep.directory} has been evaluated; `refinedet sweep` runs them.")
    return SweepResult(
        tuple(_summarize(variant, found[variant], scores[variant]) for variant in found),
        tuple(result for claim in sweep.spec.compare for result in _judge(claim, scores)),
    )


def headline_score(run_dir: str) -> str:
    """ "AP 0.412" of the first evaluation of a run, in words where there is none."""
    for result in read_run(run_dir).evaluations.values():
        name = headline(result.values)
        if (value := result.values.get(name)) is not None:
            return f"{name} {value:.3f}"
    return "not evaluated"


def _scores(by_seed: Mapping[int, RunFolder]) -> dict[str, dict[int, float]]:
    """Metric and scale -> seed -> value."""
    scores: dict[str, dict[int, float]] = {}
    for seed, run in by_seed.items():
        for mode, result in run.evaluations.items():
            names = dict.fromkeys([headline(result.values), *(name for name in ("AP50",) if name in result.values)])
            for name in names:
                if (value := result.values.get(name)) is not None:
                    scores.setdefault(f"{name}, {MODE_TITLES[mode].lower()}", {})[seed] = value
    return scores


def _summarize(variant: str, runs: Mapping[int, RunFolder], scores: Mapping[str, dict[int, float]]) -> VariantResult:
    seconds = [total for run in runs.values() if (total := ledger_total(run))]
    return VariantResult(
        variant,
        {name: _summary(list(by_seed.values())) for name, by_seed in scores.items()},
        statistics.fmean(seconds) if seconds else None,
        len(runs),
    )


def _summary(values: Sequence[float]) -> Summary:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread, tuple(values))


def _judge(claim: Claim, scores: Mapping[str, Mapping[str, Mapping[int, float]]]) -> list[ClaimResult]:
    """In the metrics of the first scale that both variants have."""
    better, worse = scores[claim.better], scores[claim.worse]
    metrics = [name for name in better if name in worse] or ["AP, single scale"]
    scale = metrics[0].split(", ")[1]
    return [
        _judge_metric(claim, name, better.get(name, {}), worse.get(name, {}))
        for name in metrics
        if name.split(", ")[1] == scale
    ]


def _judge_metric(claim: Claim, metric: str, above: Mapping[int, float], below: Mapping[int, float]) -> ClaimResult:
    differences = [100 * (above[seed] - below[seed]) for seed in above if seed in below]
    text = f"{claim.better} > {claim.worse}"
    if not differences:
        return ClaimResult(text, metric, None, claim.paper, "not run")
    found = _summary(differences)
    if found.spread is None:
        verdict = "undecided (one seed)"
    elif abs(found.mean) <= found.spread:
        verdict = "undecided"
    else:
        verdict = "holds" if found.mean > 0 else "contradicted"
    return ClaimResult(text, metric, found, claim.paper, verdict)
