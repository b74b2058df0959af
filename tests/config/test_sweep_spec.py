"""Reading sweeps: each run's spec, and a sentence for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from refinedet.pipeline.config.sweep_spec import load_sweep
from refinedet.pipeline.runs.errors import UserError

SWEEPS = sorted((Path(__file__).parents[2] / "jobs" / "sweeps").glob("*.yaml"))
SWEEP: dict[str, Any] = {
    "name": "two",
    "job": "job.yaml",
    "seeds": [4, 5],
    "variants": {"full": {}, "vanilla": {"model": {"head": "vanilla"}}},
    "compare": [{"better": "full", "worse": "vanilla", "paper": 1.1}],
}
JOB = {
    "name": "job",
    "runs": "elsewhere",
    "data": {"format": "shapes", "train": [{"count": 4}]},
    "model": {"num_classes": 10, "theta": 0.9},
}


def write(folder: Path, **changes: Any) -> str:
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    return str(folder / "sweep.yaml")


def test_every_variant_runs_with_every_seed_and_shares_the_shards(tmp_path):
    sweep = load_sweep(write(tmp_path), ["training.epochs=3"])
    assert [(run.spec.name, run.spec.seed) for run in sweep.runs] == [
        ("full-4", 4), ("vanilla-4", 4), ("full-5", 5), ("vanilla-5", 5)]  # fmt: skip
    assert {run.spec.runs for run in sweep.runs} == {"elsewhere/two"}
    assert {run.spec.data.shards for run in sweep.runs} == {"elsewhere/two/shards"}
    assert {run.spec.training.epochs for run in sweep.runs} == {3}
    assert [run.spec.model.head for run in sweep.runs] == ["align", "vanilla"] * 2
    assert {run.spec.model.theta for run in sweep.runs} == {0.9}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {}}, "at least one variant"),
        ({"seeds": [1, 1]}, "seeds that differ"),
        ({"seeds": [-1]}, "seeds"),
        ({"at_once": 0}, "at_once"),
        ({"variants": {"a b": {}}}, "'a b'"),
        ({"variants": {"full": {"models": {}}}, "compare": []}, "variant full: there is no key `models`"),
        ({"compare": [{"better": "full", "worse": "none"}]}, "'none'"),
        ({"variant": {}}, "did you mean `variants`?"),
        ({"job": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=r".") as raised:
        load_sweep(write(tmp_path, **changes))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_that_ship_are_read(path):
    sweep = load_sweep(str(path), ["data.root=elsewhere"])
    assert sweep.spec.name == path.stem
    assert len(sweep.runs) == len(sweep.spec.seeds) * len(sweep.spec.variants)
    assert len({run.spec.model_dump_json(exclude={"name", "seed"}) for run in sweep.runs}) == len(sweep.spec.variants)
    assert {run.spec.data.root for run in sweep.runs} == {"elsewhere"}
    head = path.read_text().partition("\nname:")[0]
    assert f"# Command:   refinedet sweep jobs/sweeps/{path.name}" in head
    assert all(f"\n# {word}:" in head for word in ("Hardware", "Expected", "Time"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_claims_of_sweeps_that_ship_are_the_papers(path):
    """mAP of tables II to IV on VOC 2007 test, and of section V-A's deformable convolution."""
    full, vanilla, no_filtering, no_cascade = 81.1, 80.0, 79.5, 77.3
    paper = {
        "full": full, "vanilla": vanilla, "deformable": 80.5, "no_filtering": no_filtering,
        "no_cascade": no_cascade, "no_tcb": 76.2, "kernel_3": full, "kernel_5": 81.3, "kernel_7": 81.2,
        "theta_1": no_filtering, "theta_099": vanilla, "theta_098": 80.0, "theta_095": 79.6, "theta_090": 78.1,
        "theta_080": 75.2,
    }  # fmt: skip
    sweep = load_sweep(str(path)).spec
    assert sweep.compare or len(sweep.variants) == 1
    for claim in sweep.compare:
        assert claim.paper == pytest.approx(paper[claim.better] - paper[claim.worse])
