"""The statistics of a job's training and validation data, beside one another and beside its model; what is striking.

`data.json` in the run directory holds them: {"parts": {"train": ..., "val": ...}, "shared": ..., "findings": [...]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.reading import read_facts
from refinedet.pipeline.data.statistics import ELONGATED, anchor_reach, image_hashes, read_statistics
from refinedet.pipeline.data.statistics_table import share

_EXAMPLES = 3
_MANY_UNREACHED = 0.05
"""share of a part's objects from which the anchors are worth a sentence"""


def job_statistics(parts: Mapping[str, ShardSet], model: RefineDetConfig) -> dict[str, Any]:
    """Statistics of the parts ("train", "val"), what they share, and one sentence for each striking fact."""
    found = {
        part: {**read_statistics(shards), "anchors": anchor_reach(shards, model)} for part, shards in parts.items()
    }
    shared = _shared_images(parts["train"], parts["val"]) if {"train", "val"} <= parts.keys() else {}
    findings = [*_shared_finding(shared), *(text for part in found for text in _part_findings(part, found[part]))]
    return {"parts": found, "shared": shared, "findings": findings}


def _shared_images(train: ShardSet, val: ShardSet) -> dict[str, Any]:
    """Validation images that are training images too, by the content of their files."""
    positions = np.flatnonzero(np.isin(image_hashes(val), image_hashes(train)))
    names = [facts["file_name"] for facts in read_facts(val, positions[:_EXAMPLES].tolist())]
    return {"images": len(positions), "of": val.num_samples, "examples": names}


def _shared_finding(shared: Mapping[str, Any]) -> list[str]:
    if not shared.get("images"):
        return []
    if shared["images"] == shared["of"]:
        return [
            f"all {shared['of']:,} images of data.val are in data.train too: scores measure "
            "memorized images, not new ones"
        ]
    return [
        f"{shared['images']:,} of the {shared['of']:,} images of data.val are in data.train too, for example "
        f"{', '.join(shared['examples'])}: scores are too good; remove them from one of the two"
    ]


def _part_findings(part: str, found: Mapping[str, Any]) -> list[str]:
    findings = []
    missing = [name for name, entry in found["classes"].items() if not entry["objects"]]
    if part == "train" and missing:
        findings.append(f"data.train has no object of {len(missing)} classes: {', '.join(missing[:10])}")
    if copies := found["duplicates"]["images"]:
        groups = "; ".join(" = ".join(group) for group in found["duplicates"]["examples"][:_EXAMPLES])
        findings.append(f"data.{part} has {copies:,} images whose file equals another's (samples {groups})")
    anchors = found["anchors"]
    if part == "train" and anchors["unreached"] > _MANY_UNREACHED * anchors["objects"]:
        because = anchors["unreached_because"]
        worst = sorted(anchors["unreached_by_class"].items(), key=lambda entry: -entry[1])[:_EXAMPLES]
        findings.append(
            f"{share(anchors['unreached'], anchors['objects'])} of the objects of data.train overlap no anchor by "
            f"{anchors['iou']:g} at input size {anchors['input_size']}: {because['small']:,} are too small (a larger "
            f"model.input_size reaches more), {because['elongated']:,} longer than {ELONGATED:g} times their width; "
            f"most are {', '.join(f'{name} ({count:,})' for name, count in worst)}"
        )
    return findings
