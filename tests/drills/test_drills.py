"""Every drill, as `refinedet drill` runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from refinedet.pipeline.drills.bench import Bench
from refinedet.pipeline.drills.cases import DRILLS
from refinedet.pipeline.drills.faults import Fault, hook, parse_faults
from refinedet.pipeline.drills.witness import read_attempts
from refinedet.pipeline.runs.errors import UserError

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        bench = Bench(tmp_path_factory.mktemp("drills"))
        yield bench
        bench.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_passes(bench: Bench, name: str) -> None:
    bench.checks.clear()
    try:
        DRILLS[name](bench)
    finally:
        bench.end_jobs()
    assert bench.checks
    failed = [
        f"{check.what}: expected {check.expected}, seen {check.seen}" for check in bench.checks if not check.passed
    ]
    assert not failed, "\n".join(failed)


def test_passes_are_put_in_order_and_a_new_process_begins_a_new_start(tmp_path: Path) -> None:
    notes = {
        "0-2-11": [[1.0, ["b"]], [2.0, ["d"]]],
        "1-2-12": [[1.1, ["a"]]],  # killed in the second pass
        "0-1-21": [[9.0, ["c"]], [9.2, ["e", "f"]]],
        "2-3-33": [[9.4, ["i"]]],
        "0-3-31": [[9.5, ["g"]]],
        "1-3-32": [[9.6, ["h"]]],
    }
    (tmp_path / "witness").mkdir()
    for name, lines in notes.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "witness" / f"{name}.jsonl").write_text(text + '[9.9, ["cut')
    assert read_attempts(str(tmp_path)) == [
        [["a", "b"], ["d"]],
        [["c"], ["e", "f"]],
        [["g", "h", "i"]],
    ]


def test_faults_are_parsed() -> None:
    assert parse_faults("nan:rank=1,step=3;slow:rank=0,seconds=0.5") == [Fault("nan", 1, 3), Fault("slow", 0, 0, 0.5)]
    assert hook("nan:rank=1") == "refinedet.pipeline.drills.faults:faulty_loss nan:rank=1"
    with pytest.raises(UserError, match=r"KIND of .*received 'explode:rank=1'"):
        hook("explode:rank=1")
