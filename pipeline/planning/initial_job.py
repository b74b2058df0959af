"""A job spec for a data set of one's own: classes, input size and schedule from what the data set holds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import numpy as np
import yaml
from refinedet.pipeline.config.spec import Data
from refinedet.pipeline.config.spec_files import parse_spec
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.images import read_header
from refinedet.pipeline.data.readers import Part, read_part
from refinedet.pipeline.data.recognition import Recognised

_MANY = 2**62
_SMALLEST_ANCHOR = 32  # pixels
_REACHED = 0.75
"""share of the objects that should be as large as half of the smallest anchor's area"""
_TRAINED_ON = 0.9
"""share of the images that is trained on where the data set has no validation split"""
_FEWEST_DIVIDED = 10
"""images from which a data set without a validation split is divided"""
_SAMPLED = 200  # images whose headers are read where annotations have no size


@dataclass(frozen=True)
class Hardware:
    """Hardware for which the job of a data set is written."""

    gpus: int
    cpus: int


@dataclass(frozen=True)
class InitialJob:
    name: str
    file: str
    text: str
    """YAML, with comments"""
    summary: str
    """one line about the data set"""


def propose_job(found: Recognised, hardware: Hardware, name: str | None = None, file: str | None = None) -> InitialJob:
    """Write a job that trains on a data set. Raises UserError for what cannot be trained on.

    name  default: the directory's
    file  path that the spec will have, for its comments; default: NAME.yaml
    """
    faults = FaultLog(_MANY, found.root, silent=True)
    held_out = not found.val and len(_read(found, "train", faults).records) >= _FEWEST_DIVIDED
    if held_out:
        found = _hold_out(found)
    train = _read(found, "train", faults)
    num_val = len(_read(found, "val", faults).records) if found.val else 0
    classes = [category.name for category in train.categories]
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(found.root)).strip("-._") or "job"
    size = _input_size(train, hardware)
    values = {
        "name": name,
        "data": _data_section(found, classes, len(train.records), num_val, hardware),
        "model": _model_section(len(classes), size, hardware),
        "training": _training_section(len(train.records), bool(num_val), hardware),
        "cluster": _cluster_section(hardware),
    }
    parse_spec(values, source=name)
    objects = sum(len(record.annotations) for record in train.records)
    summary = (
        f"{found.format}: {len(train.records):,} images to train on with {objects:,} objects of {len(classes)} "
        f"classes, {num_val:,} images to validate on"
    )
    if len(faults):
        summary += f"; {len(faults)} faults, the first: {faults.faults[0]}"
    if held_out:
        summary += " (no validation split was found: every tenth image is held out)"
    file = file or f"{name}.yaml"
    return InitialJob(name, file, _comments(summary, file, num_val, held_out, hardware) + _dump(values), summary)


def _read(found: Recognised, part: str, faults: FaultLog) -> Part:
    data = {"format": found.format, "root": found.root, "train": found.train, "val": found.val}
    return read_part(Data.model_validate(data), part, faults)


def _hold_out(found: Recognised) -> Recognised:
    """The data set with a tenth of its images to validate on."""
    train = tuple(split.model_copy(update={"share": (0.0, _TRAINED_ON)}) for split in found.train)
    return replace(
        found, train=train, val=tuple(split.model_copy(update={"share": (_TRAINED_ON, 1.0)}) for split in train)
    )


def _data_section(
    found: Recognised, classes: list[str], num_train: int, num_val: int, hardware: Hardware
) -> dict[str, object]:
    sections: dict[str, object] = {"format": found.format, "root": found.root, "classes": classes}
    for part, splits, count in (("train", found.train, num_train), ("val", found.val, num_val)):
        listed = [split.model_dump(exclude_defaults=True) for split in splits]
        if len(listed) == 1:
            listed[0]["count"] = count
        if listed:
            sections[part] = listed
    return sections | ({"loader_workers": 4} if hardware.gpus else {"loader_workers": 0})


def _model_section(num_classes: int, size: int, hardware: Hardware) -> dict[str, object]:
    if hardware.gpus:
        return {"num_classes": num_classes, "input_size": size, "backbone": "resnet50"}
    small = {"backbone": "regnetx_002", "tcb_channels": 128, "prediction_block": False}
    return {"num_classes": num_classes, "input_size": size, **small}


def _training_section(num_images: int, validated: bool, hardware: Hardware) -> dict[str, object]:
    """A schedule that shows the detector enough images, and no image too often."""
    batch = min(32 if hardware.gpus else 16, num_images)
    wanted, least, most = (400_000, 12, 300) if hardware.gpus else (20_000, 6, 100)
    epochs = int(np.clip(round(wanted / num_images), least, most))
    steps = -(-num_images // batch)
    warmup = round(min(max(1.0, 500 / steps), epochs / 10), 1)
    section: dict[str, object] = {
        "global_batch": batch,
        "epochs": epochs,
        "learning_rate": 0.004 if hardware.gpus else 0.02,
        "reference_batch": 32 if hardware.gpus else 16,
        "warmup_epochs": warmup,
        "warmup_learning_rate": 0.0004 if hardware.gpus else 0.002,
        "decay_epochs": [round(0.7 * epochs), round(0.9 * epochs)],
        "gradient_clip": 10,
    }
    return section | ({"validate_every_epochs": max(1, epochs // 10)} if validated else {})


def _cluster_section(hardware: Hardware) -> dict[str, object]:
    if hardware.gpus:
        cpus = max(1, min(8, hardware.cpus // hardware.gpus))
        return {"workers": hardware.gpus, "gpus_per_worker": 1, "cpus_per_worker": cpus}
    return {"workers": max(1, min(2, hardware.cpus))}


def _input_size(train: Part, hardware: Hardware) -> int:
    """The smallest size at which most objects are as large as the smallest anchor needs, within the hardware's reach.

    It is not much larger than the images: enlarged pixels add no information.
    """
    sizes = (320, 512, 1024) if hardware.gpus else (128, 192, 256, 320)
    sides, longest = [], []
    headers = _SAMPLED
    for record in train.records:
        width, height = record.width, record.height
        if (not width or not height) and headers:
            headers -= 1
            header = read_header(record.load())
            width, height = (header.width, header.height) if header else (None, None)
        if width and height:
            longest.append(max(width, height))
            sides += [(a.bbox[2] * a.bbox[3] / (width * height)) ** 0.5 for a in record.annotations if not a.iscrowd]
    if not sides:
        return sizes[-2]
    needed = _SMALLEST_ANCHOR * 0.5**0.5 / max(float(np.quantile(sides, 1 - _REACHED)), 1e-6)
    most = 1.5 * float(np.median(longest))
    fitting = [size for size in sizes if size <= most] or [sizes[0]]
    return next((size for size in fitting if size >= needed), fitting[-1])


def _comments(summary: str, file: str, num_val: int, held_out: bool, hardware: Hardware) -> str:
    lines = [
        f"# {summary}",
        "#",
        f"# See the data:  refinedet shard {file}; refinedet data stats {file}; refinedet data show {file}",
        f"# Estimate:      refinedet plan {file}",
        f"# Train:         refinedet launch {file}",
        "#",
        "# Training starts from random weights. With few images, start from ImageNet weights of the backbone:",
        "# training.init_weights=timm (downloaded by timm), or training.init_weights=FILE. Below some thousand images,",
        "# leave their layers as they are: model.norm=frozen training.backbone_lr_multiplier=0 (docs/own-data.md).",
    ]
    if held_out:
        lines += [
            "#",
            "# `share` divides the images by their names. Frames of one video look alike: keep them in one directory,",
            "# and name other directories in data.val.",
        ]
    elif not num_val:
        lines += ["#", "# No validation split was found, so nothing is measured: name one in data.val."]
    if not hardware.gpus:
        lines += ["#", "# No GPU was found: a small backbone, small images and a short schedule."]
    return "\n".join(lines) + "\n"


def _dump(values: dict[str, object]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
