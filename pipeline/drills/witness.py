"""Notes of the samples that training has really learned from, taken inside its workers.

Every worker calls `witnessed_loss` where the driver's REFINEDET_FAULT is
"refinedet.pipeline.drills.witness:witnessed_loss FAULTS". A fingerprint of a sample's objects after augmentation stands
for the sample; it differs from epoch to epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refinedet.pipeline.config.run import Run
from refinedet.pipeline.drills.faults import faulty_loss, parse_faults

_FOLDER = "witness"
Fingerprints = list[str]
"""fingerprints of the samples of one forward pass of all ranks, sorted"""


def hook(faults: str = "") -> str:
    """Value of REFINEDET_FAULT that takes notes, and injects `faults` too."""
    parse_faults(faults)
    return f"{__name__}:{witnessed_loss.__name__} {faults}"


def witnessed_loss(faults: str, run: Run, rank: int) -> Callable[..., Any]:
    """The loss of the run's model, with faults, which notes its samples in a file of this process."""
    import torch.distributed as dist  # by workers alone: `refinedet drill` answers without torch

    loss = faulty_loss(faults, run, rank)
    path = Path(run.file(_FOLDER)) / f"{rank}-{dist.get_world_size()}-{os.getpid()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def witnessed(predictions: Any, targets: Any) -> Any:
        losses = loss(predictions, targets)
        line = json.dumps([time.time(), [_fingerprint(each) for each in targets]])
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return losses

    return witnessed


def read_attempts(run_dir: str) -> list[list[Fingerprints]]:
    """The passes of every start of the workers, oldest first; the last pass of a killed start may be incomplete."""
    notes = []
    for path in Path(run_dir, _FOLDER).glob("*.jsonl"):
        rank, size, pid = path.stem.split("-")
        lines = [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1:] == "\n"
        ]
        notes += [(at, number, rank, (size, pid), samples) for number, (at, samples) in enumerate(lines)]
    attempts: list[list[Fingerprints]] = []
    workers: dict[str, tuple[str, str]] = {}
    size_now = ""
    for _, number, rank, worker, samples in sorted(notes):
        # All workers start anew together, in processes of their own, or in another number.
        if not attempts or workers.setdefault(rank, worker) != worker or worker[0] != size_now:
            attempts.append([])
            workers, size_now = {rank: worker}, worker[0]
        passes = attempts[-1]
        passes += [[] for _ in range(number + 1 - len(passes))]
        passes[number] = sorted([*passes[number], *samples])
    return attempts


def _fingerprint(targets: Any) -> str:
    content = targets.boxes.cpu().numpy().tobytes() + targets.labels.cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]
