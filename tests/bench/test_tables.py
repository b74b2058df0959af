"""BENCHMARKS.md and the plots follow from the results, and an incomplete result is refused."""

import json
import re
from pathlib import Path

import pytest

from tests.bench.plots import PLOTS, draw_all
from tests.bench.tables import DOCUMENT, REPOSITORY, RESULTS, ResultError, read_result, rebuild, render

RESULT = {
    "command": "python -m bench",
    "commit": None,
    "date": "2026-01-02",
    "hardware": "one core",
    "versions": {"torch": "2"},
    "spread": None,
    "columns": ["case", "ms"],
    "rows": [["ours", 1]],
}
SCORES = {"AP, single scale": {"mean": 0.25, "spread": 0.01, "values": [0.24, 0.26]}}
SWEEP = {
    "variants": [{"variant": "no_tcb", "scores": SCORES, "seconds": 90, "done": 2}],
    "claims": [
        {"claim": "full > no_tcb", "metric": "AP", "difference": None, "paper": 1.1, "verdict": "not run"},
        {"claim": "a > b", "metric": "AP", "paper": None, "verdict": "undecided",
         "difference": {"mean": -0.5, "spread": 1.0, "values": [0.5, -1.5]}},
    ],
}  # fmt: skip


def test_the_document_is_what_the_command_makes():
    assert rebuild(DOCUMENT.read_text()) == DOCUMENT.read_text(), "run `make benchmarks`"


def test_the_plots_are_what_the_command_makes():
    for path, made in draw_all().items():
        assert path.read_text() == made, "run `make benchmarks`"
        assert path.stat().st_size < 100_000
        assert str(path.relative_to(REPOSITORY)) in (REPOSITORY / "README.md").read_text()


def test_tables_of_figures_come_from_results():
    """Only the list of commands is written by hand."""
    outside = re.sub(r"<!-- table.*?<!-- end -->", "", DOCUMENT.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^(\|.*)\n\|---", outside, flags=re.MULTILINE)
    assert heads == ["| Command | What | Measured |"]


def test_digits_are_printed_as_written(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RESULT).replace("1]", "1.10]"))
    document = rebuild("before\n<!-- table: one -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert document == (
        "before\n<!-- table: one -->\n"
        "`python -m bench`; commit not recorded; 2026-01-02; one core; torch 2. Spread: not recorded.\n\n"
        "| case | ms |\n|---|---|\n| ours | 1.10 |\n<!-- end -->\nafter\n"
    )
    assert rebuild(document, tmp_path) == document


def test_a_sweep_has_variants_and_claims(tmp_path):
    bare = {key: value for key, value in RESULT.items() if key not in ("columns", "rows")}
    (tmp_path / "sweep.json").write_text(json.dumps({**bare, "sweep": SWEEP}))
    made = render(read_result(tmp_path / "sweep.json"))
    assert "| no tcb | 0.2500 ± 0.0100 | 1.5 | 2 |" in made
    assert "| full > no tcb | AP | | +1.1 | not run |" in made
    assert "| a > b | AP | -0.50 ± 1.00 | | undecided |" in made
    for path in draw_all(tmp_path):
        assert path.stem in PLOTS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no result"),
        (json.dumps({key: value for key, value in RESULT.items() if key != "commit"}), "lacks commit"),
        (json.dumps({key: value for key, value in RESULT.items() if key != "rows"}), "neither"),
        (json.dumps({**RESULT, "rows": [[1]]}), "1 rows do not have 2 cells"),
    ],
)
def test_a_result_that_says_too_little_is_one_sentence(tmp_path: Path, text, said):
    (tmp_path / "one.json").write_text(text)
    with pytest.raises(ResultError, match=said) as raised:
        read_result(tmp_path / "one.json")
    assert "\n" not in str(raised.value)


def test_a_table_without_a_result_is_refused(tmp_path):
    with pytest.raises(ResultError, match="absent"):
        rebuild("<!-- table: absent -->\n<!-- end -->\n", tmp_path)
    text = DOCUMENT.read_text().replace("<!-- table: merge -->", "<!-- table: stream -->")
    with pytest.raises(ResultError, match="merge"):
        rebuild(text, RESULTS)


def test_results_name_no_path_of_the_machine_that_measured():
    for path in RESULTS.glob("*.json"):
        assert not re.search(r'"/|=/', path.read_text()), f"{path.name} holds an absolute path"
