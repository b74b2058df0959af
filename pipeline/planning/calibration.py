"""Rates measured by `refinedet plan --calibrate`, kept in a JSON file, and the plan's use of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.planning.device_speeds import Speed
from refinedet.pipeline.runs.errors import UserError

DEFAULT_FILE = "~/.cache/refinedet/calibration.json"
_OTHER_MODELS = 2.0
"""factor by which the rate of one model may differ from another's on the same device: 2.3 between the two CPU jobs"""


@dataclass(frozen=True)
class Calibration:
    """One measured run.

    device       key of DEVICES
    hardware     as the system names it
    model        for people
    fingerprint  of all that the rate depends on but the hardware
    workers      that ran at the same time
    training     GFLOP/s that one worker reached: in the slowest and the fastest of some blocks of steps
    detection    the same of detection, decoding and NMS included: of the slower and the faster validation
    measured_at  date
    """

    device: str
    hardware: str
    model: str
    fingerprint: str
    workers: int
    training: tuple[float, float]
    detection: tuple[float, float]
    measured_at: str


def fingerprint(spec: JobSpec) -> str:
    """Digest of what a rate belongs to: model, sizes, precisions, threads, micro-batch; not the number of classes."""
    model = spec.model_dump(mode="json")["model"]
    training, evaluation = spec.training, spec.evaluation
    facts = {
        **{key: value for key, value in model.items() if key != "num_classes"},
        "sizes": training.input_sizes,
        "precision": [training.precision, evaluation.precision],
        "backbone_trained": training.backbone_lr_multiplier != 0,
        "micro_batch": training.micro_batch,
        "cpus": spec.cluster.cpus_per_worker if not spec.cluster.gpus_per_worker else 0,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_calibrations(file: str) -> list[Calibration]:
    """Read the calibrations of a file, oldest first; none where it does not exist. Raises UserError."""
    path = Path(os.path.expanduser(file))
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            Calibration(**{**entry, "training": tuple(entry["training"]), "detection": tuple(entry["detection"])})
            for entry in entries
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the calibrations in {file} cannot be read ({type(error).__name__}: {error}); remove the file and "
            "calibrate again, or give another by --calibration"
        ) from None


def save_calibration(file: str, new: Calibration) -> None:
    """Add a calibration; it replaces those of the same hardware and fingerprint. Raises UserError."""
    kept = [
        each for each in load_calibrations(file) if (each.hardware, each.fingerprint) != (new.hardware, new.fingerprint)
    ]
    path = Path(os.path.expanduser(file))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps([asdict(each) for each in (*kept, new)], indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"the calibration cannot be written to {file}: {error.strerror}; give another file") from None


def measured_speed(spec: JobSpec, device: str, hardware: str | None, known: Sequence[Calibration]) -> Speed | None:
    """The rates that calibrations give a job; None without one of this device.

    device    key of DEVICES
    hardware  the CPU of this machine, as CPUs of different models differ; None: any of this device
    The same model counts as measured. Of others a range is made: half the lowest rate to twice the highest.
    """
    same = [each for each in known if each.device == device and hardware in (None, each.hardware)]
    own = [each for each in same if each.fingerprint == fingerprint(spec)]
    if own:
        newest = own[-1]
        basis = (
            f"measured on {newest.hardware}, {newest.workers} workers at once, {newest.measured_at}: training at "
            f"{newest.training[0]:,.0f} to {newest.training[1]:,.0f} GFLOP/s a worker"
        )
        return Speed(newest.training, newest.detection, basis, measured=True)
    if not same:
        return None
    ends = {
        name: (
            min(getattr(each, name)[0] for each in same) / _OTHER_MODELS,
            max(getattr(each, name)[1] for each in same) * _OTHER_MODELS,
        )
        for name in ("training", "detection")
    }
    others = ", ".join(sorted({each.model for each in same}))
    basis = f"other models measured on {same[-1].hardware} ({others}), half to twice their rate; --calibrate this one"
    return Speed(ends["training"], ends["detection"], basis)
