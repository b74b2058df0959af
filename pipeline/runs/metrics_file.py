"""Layout of `metrics.json`, for all its readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def metric_values(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Numbers by name of one mode of `metrics.json`, which lie under the metric that its `protocol` names."""
    protocol = evaluation.get("protocol")
    values = evaluation.get(str(protocol.get("metric"))) if isinstance(protocol, Mapping) else None
    return values if isinstance(values, Mapping) else {}
