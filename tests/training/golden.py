"""Losses of the smallest real detector: 20 steps on two workers, for every precision and ZeRO stage a CPU runs.

    python -m tests.training.golden

writes tests/golden/losses.json. Run it after a change that is meant to change them, and give the reason in the commit.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from refinedet.pipeline.config.spec import Training

from tests.training.workers import run_workers

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "losses.json"
CASES = [(precision, stage) for precision in ("fp32", "bf16", "fp16") for stage in (1, 2)]


def train_losses(precision: str, stage: int, folder: Path) -> list[float]:
    """Total loss of every step."""
    spec = Training(
        global_batch=8,
        micro_batch=2,
        epochs=4,
        learning_rate=1e-3,
        warmup_learning_rate=1e-4,
        reference_batch=8,
        decay_epochs=(3,),
        precision=precision,  # type: ignore[arg-type]
        zero_stage=stage,
        deterministic=True,
        checkpoint_every_epochs=4,
        bias_lr_multiplier=2,
        bias_decay_multiplier=0,
    )
    outcomes = run_workers(folder / f"{precision}-{stage}", 2, spec, refinedet=True)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    return [round(record["losses"]["total"], 6) for record in outcomes[0].steps]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = {
            f"{precision}-zero{stage}": train_losses(precision, stage, Path(folder)) for precision, stage in CASES
        }
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {"command": "python -m tests.training.golden", "where": describe_machine(), "losses": losses}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


def describe_machine() -> str:
    """The facts that decide how sums are rounded."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
