from __future__ import annotations

import json

import pytest
from refinedet.pipeline.cli.comparisons import app
from refinedet.pipeline.runs.errors import UserError
from typer.testing import CliRunner

from tests.report.synthetic import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("[red]first", "second"):
        write_run(folder / name, num_images=4, size=32, num_steps=12)
    return folder


def test_runs_are_listed_for_people_and_for_scripts(runs):
    shown = CliRunner().invoke(app, ["runs", str(runs)], env={"COLUMNS": "200"}).output
    assert "[red]first" in shown
    assert "0.503" in shown
    rows = json.loads(CliRunner().invoke(app, ["runs", str(runs), "--json"]).output)
    assert [row["run"] for row in rows] == ["[red]first", "second"]
    assert "holds no runs" in CliRunner().invoke(app, ["runs", str(runs / "second")]).output


def test_runs_are_compared_in_the_terminal_as_json_and_as_a_page(runs, tmp_path):
    paths = [str(runs / "[red]first"), str(runs / "second")]
    shown = CliRunner().invoke(app, ["compare", *paths, "--page", str(tmp_path / "both.html")], env={"COLUMNS": "200"})
    assert "AP, single scale" in shown.output
    assert (tmp_path / "both.html").exists()
    found = json.loads(CliRunner().invoke(app, ["compare", *paths, "--json"]).output)
    assert found["names"] == ["[red]first", "second"]


def test_one_run_cannot_be_compared(runs):
    assert isinstance(CliRunner().invoke(app, ["compare", str(runs / "second")]).exception, UserError)
