"""Means, spreads and verdicts of a sweep, beside numbers worked out by hand."""

import json
from pathlib import Path

import pytest
import yaml
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.config.sweep_spec import load_sweep
from refinedet.pipeline.report.sweep_results import compare_sweep
from refinedet.pipeline.runs.errors import UserError
from typer.testing import CliRunner

# AP of each variant, by seed. Differences in points: a-b 2, 4, 3 (mean 3, deviation 1); b-c 1, -1, 3 (mean 1,
# deviation 2); c-a is negative; a-d has one seed; nothing of e was run.
AP = {"a": (0.30, 0.34, 0.36), "b": (0.28, 0.30, 0.33), "c": (0.27, 0.31, 0.30), "d": (0.2, None, None), "e": ()}
CLAIMS = [("a", "b"), ("b", "c"), ("c", "a"), ("a", "d"), ("a", "e")]


@pytest.fixture
def sweep_file(tmp_path: Path) -> str:
    job = {"name": "j", "runs": str(tmp_path), "data": {"format": "shapes", "train": [{"count": 4}]}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    claims = [{"better": better, "worse": worse, "paper": 0.5} for better, worse in CLAIMS]
    sweep = {"name": "s", "job": "job.yaml", "variants": {name: {} for name in AP}, "compare": claims}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return str(tmp_path / "sweep.yaml")


def evaluate(sweep_file: str) -> None:
    for name, scores in AP.items():
        for seed, ap in enumerate(scores):
            if ap is not None:
                folder = Path(sweep_file).parent / "s" / f"{name}-{seed}"
                folder.mkdir(parents=True)
                single = {"protocol": {"metric": "coco"}, "coco": {"AP": ap, "AP50": 2 * ap}}
                (folder / "metrics.json").write_text(json.dumps({"single": single}))


def test_means_spreads_and_verdicts(sweep_file):
    evaluate(sweep_file)
    found = compare_sweep(load_sweep(sweep_file))
    by_name = {one.variant: one for one in found.variants}
    assert by_name["a"].scores["AP, single scale"].mean == pytest.approx(1 / 3)
    assert by_name["a"].scores["AP50, single scale"].mean == pytest.approx(2 / 3)
    assert by_name["a"].scores["AP, single scale"].spread == pytest.approx(0.030550504)
    assert by_name["d"].scores["AP, single scale"].spread is None
    assert (by_name["d"].done, by_name["e"].done, by_name["e"].scores) == (1, 0, {})
    claims = {(claim.claim, claim.metric.split(",")[0]): claim for claim in found.claims}
    for metric, factor in (("AP", 1), ("AP50", 2)):
        difference = claims["a > b", metric].difference
        assert difference is not None
        assert difference.mean == pytest.approx(3 * factor)
        assert difference.spread == pytest.approx(1 * factor)
        verdicts = [claim.verdict for claim in found.claims if claim.metric.startswith(f"{metric},")]
        assert verdicts[:4] == ["holds", "undecided", "contradicted", "undecided (one seed)"]
    assert claims["a > e", "AP"].verdict == "not run"
    assert len(claims) == 9


def test_metrics_are_judged_apart(sweep_file):
    evaluate(sweep_file)
    for path in Path(sweep_file).parent.glob("s/a-*/metrics.json"):
        path.write_text(path.read_text().replace('"AP50": 0.', '"AP50": 0.0'))
    found = compare_sweep(load_sweep(sweep_file)).claims
    assert [one.verdict for one in found if one.claim == "a > b"] == ["holds", "contradicted"]


def test_claims_are_judged_at_the_first_scale_alone(sweep_file):
    evaluate(sweep_file)
    for path in Path(sweep_file).parent.glob("s/*/metrics.json"):
        single = json.loads(path.read_text())["single"]
        path.write_text(json.dumps({"single": single, "multiscale": single}))
    found = compare_sweep(load_sweep(sweep_file))
    assert {one.metric for one in found.claims} == {"AP, single scale", "AP50, single scale"}
    assert "AP, multi-scale" in found.variants[0].scores


def test_the_command_prints_them_and_as_json(sweep_file):
    evaluate(sweep_file)
    text = CliRunner().invoke(app, ["compare", sweep_file], catch_exceptions=False, env={"COLUMNS": "200"}).stdout
    row = next(line for line in text.splitlines() if line.strip().startswith("a > b"))
    assert row.split()[3:] == ["AP,", "single", "scale", "3.00", "±", "1.00", "+0.5", "holds"]
    as_json = CliRunner().invoke(app, ["compare", sweep_file, "--json"], catch_exceptions=False).stdout
    assert json.loads(as_json)["claims"][0]["difference"]["values"] == pytest.approx([2, 4, 3])


def test_a_sweep_that_did_not_run_is_one_sentence(sweep_file):
    with pytest.raises(UserError, match="refinedet sweep"):
        compare_sweep(load_sweep(sweep_file))
