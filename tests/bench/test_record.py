"""A record holds where and how it was measured, and is read as a result."""

import json

from refinedet.pipeline.config.sweep_spec import load_sweep

from tests.bench.record import describe_where, save_result
from tests.bench.record_sweep import PACKAGES, where
from tests.bench.tables import read_result, render


def test_a_bench_records_its_command_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tests/bench/bench_x.py", "--size", "5", "--json", "out.json"])
    save_result(
        tmp_path / "x.json", ["case", "ms"], [["ours", 1.5]], describe_where(["numpy"]), workload="One.", spread=None
    )
    result = read_result(tmp_path / "x.json")
    assert result["command"] == "python -m tests.bench.bench_x --size 5"
    assert result["versions"].keys() == {"python", "torch", "numpy"}
    assert "| ours | 1.5 |" in render(result)


def test_a_sweep_is_where_its_evaluated_runs_were(tmp_path):
    (tmp_path / "job.yaml").write_text(
        f"name: job\nruns: {tmp_path}\ndata: {{format: shapes, train: [{{count: 4}}]}}\n"
    )
    (tmp_path / "sweep.yaml").write_text("name: two\njob: job.yaml\nseeds: [0, 1, 2]\nvariants: {full: {}}\n")
    for seed, commit in ((0, "a"), (1, "b")):
        folder = tmp_path / "two" / f"full-{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        environment = {
            "commit": commit, "versions": dict.fromkeys(PACKAGES, "1"), "processor": "P", "cores": 2,
            "memory_bytes": 8e9, "devices": [],
        }  # fmt: skip
        (folder / "environment.json").write_text(json.dumps(environment))
    found = where(load_sweep(str(tmp_path / "sweep.yaml")))
    assert (found["commit"], found["hardware"]) == ("a and b", "2 cores of P, 8 GB, no GPU")
    assert found["versions"] == dict.fromkeys(PACKAGES, "1")
