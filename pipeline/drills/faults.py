"""Faults made on purpose inside a training worker, for drills and tests.

Every worker calls `faulty_loss` where the driver's REFINEDET_FAULT is "refinedet.pipeline.drills.faults:faulty_loss
FAULTS". Faults are separated by semicolons: "nan:rank=1,step=3" makes the loss of rank 1 NaN at its third forward pass,
"slow:rank=1,seconds=0.5" delays every pass of rank 1, "hang:rank=1,step=3" stops it there for good. A fault with a step
strikes once in a run, so that the restarted worker is well.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from refinedet import model
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

KINDS = ("nan", "slow", "hang")
_LOSS_TERMS = ("arm_class", "arm_box", "adm_class", "adm_box")


@dataclass(frozen=True)
class Fault:
    """step: forward passes of the rank, from 1; 0: every one."""

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0


def hook(faults: str) -> str:
    """Value of REFINEDET_FAULT that injects `faults`."""
    parse_faults(faults)
    return f"{__name__}:{faulty_loss.__name__} {faults}"


def faulty_loss(faults: str, run: Run, rank: int) -> Callable[..., Any]:
    """The loss of the run's model, with the faults of this rank; a file in the run records that one struck."""
    loss: Callable[..., Any] = functools.partial(model.sum_losses, config=run.spec.model)
    for fault in parse_faults(faults):
        if fault.rank == rank:
            loss = _broken(loss, fault, run.path)
    return loss


def parse_faults(text: str) -> list[Fault]:
    return [_parse(each) for each in text.split(";") if each]


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition(":")
    try:
        values = dict(item.split("=") for item in rest.split(","))
        fault = Fault(kind, int(values["rank"]), int(values.get("step", 0)), float(values.get("seconds", 0)))
    except (ValueError, KeyError):
        fault = None
    if fault is None or kind not in KINDS:
        raise UserError(f"A fault reads KIND:rank=N,step=N,seconds=S with KIND of {KINDS}, received {text!r}.")
    return fault


def _broken(loss: Callable[..., Any], fault: Fault, run_dir: str) -> Callable[..., Any]:
    passes = 0
    mark = storage.join(run_dir, "faults", fault.kind)

    def broken(predictions: Any, targets: Any) -> Any:
        nonlocal passes
        passes += 1
        losses = loss(predictions, targets)
        if fault.step:
            if passes != fault.step or storage.exists(mark):
                return losses
            storage.write_json(mark, {"rank": fault.rank, "pass": passes})
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "hang":
            while True:
                time.sleep(3600)
        else:
            losses = replace(losses, **{name: getattr(losses, name) * float("nan") for name in _LOSS_TERMS})
        return losses

    return broken
