"""Faults made on purpose inside a worker, for the drills: the environment variable REFINEDET_FAULT of the driver.

"nan:rank=1,step=3" makes the loss of rank 1 NaN at its third forward pass; "slow:rank=1,seconds=0.5" delays every
pass of rank 1; "hang:rank=1,step=3" stops it there for good; "hold:rank=0,step=8" writes half of rank 0's part of the
checkpoint of step 8, and no more. Several are separated by semicolons. What strikes at a step strikes once in a run, so
that the restarted worker is well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

FAULT_VARIABLE = "REFINEDET_FAULT"
_KINDS = ("nan", "slow", "hang", "hold")


@dataclass(frozen=True)
class Fault:
    """`step` counts forward passes from 1, 0 being every one; for `hold` it is the checkpoint's."""

    kind: str
    rank: int
    step: int = 0
    seconds: float = 0.0


def read_faults() -> list[Fault]:
    """The faults that the environment asks for; none in every ordinary job."""
    text = os.environ.get(FAULT_VARIABLE, "")
    return [_parse(each) for each in text.split(";") if each]


def _parse(text: str) -> Fault:
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


def with_faults(loss: Callable[..., Any], faults: Iterable[Fault], rank: int, run_dir: str) -> Callable[..., Any]:
    """`loss`, broken as asked on this rank; a mark in the run's folder remembers what struck."""
    for fault in faults:
        if fault.rank == rank and fault.kind == "hold":
            _hold_part(fault, run_dir)
        elif fault.rank == rank:
            loss = _broken(loss, fault, run_dir)
    return loss


def mark_of(kind: str, run_dir: str) -> str:
    """The file that says that a fault has struck."""
    return storage.join(run_dir, "faults", kind)


def _broken(loss: Callable[..., Any], fault: Fault, run_dir: str) -> Callable[..., Any]:
    passes = 0
    mark = mark_of(fault.kind, run_dir)

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
            losses = replace(losses, adm_class=losses.adm_class * float("nan"))
        return losses

    return broken


def _hold_part(fault: Fault, run_dir: str) -> None:
    """Let this process hang in the middle of writing its part of one checkpoint."""
    write, mark = storage.write_bytes, mark_of(fault.kind, run_dir)

    def write_half(path: str, content: bytes) -> None:
        if f"/step-{fault.step}/part-" not in path or storage.exists(mark):
            return write(path, content)
        write(f"{path}.partial", content[: len(content) // 2])
        storage.write_json(mark, {"rank": fault.rank, "path": path})
        while True:
            time.sleep(3600)

    storage.write_bytes = write_half  # type: ignore[assignment]
