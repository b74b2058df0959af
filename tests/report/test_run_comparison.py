from __future__ import annotations

import json
import shutil

import pytest
from refinedet.pipeline.report.run_comparison import build_comparison, compare_runs, run_rows
from refinedet.pipeline.report.run_data import read_runs
from refinedet.pipeline.runs.errors import UserError

from tests.report.synthetic import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        write_run(folder / name, num_images=4, size=32, num_steps=24, seed=seed)
    spec = folder / "second" / "spec.yaml"
    spec.write_text(spec.read_text().replace("learning_rate: 0.004", "learning_rate: 0.008"))
    metrics = json.loads((folder / "second" / "metrics.json").read_text())
    metrics["single"]["coco"]["AP"] = 0.4
    (folder / "second" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_runs_are_compared_by_results_and_by_what_is_different(runs):
    found = compare_runs(read_runs([str(runs / "first"), str(runs / "second")]))
    assert found.names == ("first", "second")
    ap = next(row for row in found.results if row.name == "AP, single scale")
    assert (ap.values, ap.difference) == (("0.503", "0.400"), "−0.103")
    assert [(row.name, row.values) for row in found.spec] == [("training.learning_rate", ("0.004", "0.008"))]
    assert len(found.classes) == 8


def test_a_run_beside_itself_has_no_difference(runs):
    found = compare_runs(read_runs([str(runs / "first")] * 2))
    assert found.names == ("first (1)", "first (2)")
    assert found.spec == ()
    assert {row.difference for row in found.results} <= {"0.000", ""}


def test_the_page_holds_both_runs_and_needs_no_network(runs, tmp_path):
    path = build_comparison(read_runs([str(runs / "first"), str(runs / "second")]), str(tmp_path / "both.html"))
    page = (tmp_path / "both.html").read_text()
    assert path == str(tmp_path / "both.html")
    assert "training.learning_rate" in page
    assert "hunter2" not in page
    assert "http://" not in page.replace("http://***@mlflow.example", "").replace("http://www.w3.org", "")


@pytest.mark.parametrize("names", [[], ["first"], ["first", "nowhere"], ["first"] * 7])
def test_what_cannot_be_compared_is_a_user_error(runs, names):
    with pytest.raises(UserError):
        read_runs([str(runs / name) for name in names])


def test_all_runs_of_a_directory_are_rows(runs, tmp_path):
    (runs / "no-run").mkdir(exist_ok=True)
    rows = run_rows(str(runs))
    assert [row["run"] for row in rows] == ["first", "second"]
    assert rows[1]["AP, single scale"] == "0.400"
    assert rows[0]["status"] == "finished"
    assert run_rows(str(runs / "no-run")) == []
    with pytest.raises(UserError, match="There is no directory"):
        run_rows(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("end", "word"), [("failed", "failed"), ("stopped", "killed"), ("done", "unknown")])
def test_a_run_without_a_run_in_mlflow_ended_as_its_last_stage(runs, tmp_path, end, word):
    shutil.copytree(runs / "first", tmp_path / "first")
    (tmp_path / "first" / "tracking.json").unlink()
    lines = [{"time": 1.0, "edge": "begin", "name": "train", "status": ""}]
    lines.append({"time": 9.0, "edge": "end", "name": "train", "status": end})
    (tmp_path / "first" / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = run_rows(str(tmp_path))
    assert row["status"] == word
