"""Faults made on purpose inside a worker, for the drills: the environment variable REFINEDET_FAULT of the driver.

"nan:rank=1,step=3" makes the loss of rank 1 NaN at its third forward pass; "slow:rank=1,seconds=0.5" delays every
pass of rank 1; "hang:rank=1,step=3" stops it there for good. What strikes at a step strikes once in a run, so that the
restarted worker is well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import UserError

FAULT_VARIABLE = "REFINEDET_FAULT"
_KINDS = ("nan", "slow", "hang")


@dataclass(frozen=True)
class Fault:
    """`step` counts forward passes from 1; 0: every one."""

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0


def read_fault() -> Fault | None:
    """The fault that the environment asks for; None in every ordinary job."""
    text = os.environ.get(FAULT_VARIABLE)
    if not text:
        return None
    kind, _, rest = text.partition(":")
    try:
        values = dict(item.split("=") for item in rest.split(","))
        fault = Fault(kind, int(values["rank"]), int(values.get("step", 0)), float(values.get("seconds", 0)))
    except (ValueError, KeyError):
        fault = None
    if fault is None or kind not in _KINDS:
        raise UserError(
            f"{FAULT_VARIABLE} reads KIND:rank=N,step=N,seconds=S with KIND of {_KINDS}, received {text!r}."
        )
    return fault


def with_fault(loss: Callable[..., Any], fault: Fault | None, rank: int, run_dir: str) -> Callable[..., Any]:
    """`loss`, broken as asked on that rank; a mark in the run's folder remembers that it was."""
    if fault is None or fault.rank != rank:
        return loss
    passes = 0
    mark = storage.join(run_dir, "faults", fault.kind)

    def broken(predictions: Any, targets: Any) -> Any:
        nonlocal passes
        passes += 1
        losses = loss(predictions, targets)
        if fault.step:
            if passes != fault.step or storage.exists(mark):
                return losses
            storage.write_json(mark, {"rank": rank, "pass": passes})
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "hang":
            while True:
                time.sleep(3600)
        else:
            losses = type(losses)(*(part * float("nan") for part in losses.parts().values()))
        return losses

    return broken
