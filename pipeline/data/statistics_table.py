"""Statistics of a job's data as rows of text; without torch, so that a report need not wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def statistics_rows(statistics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows (name, a value for each part) of `job_statistics`."""
    columns = [_column(part) for part in statistics["parts"].values()]
    return [(name, [column[name] for column in columns]) for name in columns[0]] if columns else []


def _column(part: Mapping[str, Any]) -> dict[str, str]:
    counts = {name: entry["objects"] for name, entry in part["classes"].items()}
    most = max(counts, key=lambda name: counts[name])
    least = min(counts, key=lambda name: counts[name])
    width, height = part["image_width"], part["image_height"]
    return {
        "images": f"{part['images']:,}",
        "without objects": f"{part['images_without_objects']:,}",
        "image sizes": f"{width['50%']:g} x {height['50%']:g} ({width['min']:g} x {height['min']:g} to "
        f"{width['max']:g} x {height['max']:g})",
        "objects": f"{part['objects']:,}",
        "not trained on (crowds, bad boxes)": f"{part['objects_not_learnt']:,}",
        "classes": f"{len(counts)}, {sum(1 for count in counts.values() if not count)} without objects",
        "most frequent class": f"{most} ({counts[most]:,})",
        "rarest class": f"{least} ({counts[least]:,})",
        "box sides, pixels": _span(part["box_side"]),
        "box width / height": _span(part["box_aspect"]),
        "small, medium, large": ", ".join(share(part[name], part["objects"]) for name in ("small", "medium", "large")),
        **reach_and_copies(part),
    }


def reach_and_copies(part: Mapping[str, Any]) -> dict[str, str]:
    """The rows that need more than annotations: anchors, equal image files, EXIF."""
    anchors = part["anchors"]
    return {
        f"no anchor overlaps by {anchors['iou']:g} at {anchors['input_size']} px": (
            f"{anchors['unreached']:,} ({share(anchors['unreached'], anchors['objects'])})"
        ),
        "images equal to another": f"{part['duplicates']['images']:,}",
        "images with an EXIF rotation": f"{part['exif_turned']:,}",
    }


def _span(quantiles: Mapping[str, float]) -> str:
    if not quantiles:
        return "–"
    return f"{quantiles['50%']:.3g} (90 % in {quantiles['5%']:.3g} to {quantiles['95%']:.3g})"


def share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.0f} %"
