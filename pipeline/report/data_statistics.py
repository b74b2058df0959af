"""Statistics of the run's data: from its COCO ground truth, and its shards: anchors, copies and EXIF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from refinedet.pipeline.data.statistics_table import reach_and_copies

_SMALL, _LARGE = 32**2, 96**2


def statistics_tables(parts: Mapping[str, Mapping[str, Any]], shards: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows (name, a value for each part) of parts such as {"train": truth, "val": truth}; empty without truth.

    shards  the run's `job_statistics`; empty: its rows are excluded
    """
    found = shards.get("parts", {})
    shown = [part for part, truth in parts.items() if truth]
    known = all(part in found for part in shown)
    columns = [_statistics(parts[part]) | (reach_and_copies(found[part]) if known else {}) for part in shown]
    if not columns:
        return []
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _statistics(truth: Mapping[str, Any]) -> dict[str, str]:
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    rows = [row for row in truth["annotations"] if row.get("category_id") in names]
    objects = [row for row in rows if not row.get("iscrowd")]
    per_image = Counter(row["image_id"] for row in objects)
    num_images = len(truth["images"])
    areas = np.array([_area(row) for row in objects], float)
    counts = Counter(names[row["category_id"]] for row in objects)
    total = max(len(objects), 1)
    most = counts.most_common(1)
    sizes = [int(part.sum()) for part in (areas < _SMALL, (areas >= _SMALL) & (areas < _LARGE), areas >= _LARGE)]
    return {
        "images": f"{num_images:,}",
        "without objects": f"{num_images - len(per_image):,}",
        "objects": f"{len(objects):,}",
        "crowd regions": f"{len(rows) - len(objects):,}",
        "objects per image": f"{len(objects) / max(num_images, 1):.1f}, at most {max(per_image.values(), default=0)}",
        "small, below 32² px": f"{100 * sizes[0] / total:.0f} %",
        "medium": f"{100 * sizes[1] / total:.0f} %",
        "large, above 96² px": f"{100 * sizes[2] / total:.0f} %",
        "classes": f"{len(names)}",
        "classes without objects": f"{sum(1 for name in names.values() if not counts[name])}",
        "most frequent class": f"{most[0][0]} ({100 * most[0][1] / total:.0f} %)" if most else "–",
    }


def _area(row: Mapping[str, Any]) -> float:
    area = row.get("area")
    if isinstance(area, int | float):
        return float(area)
    return float(row["bbox"][2]) * float(row["bbox"][3])
