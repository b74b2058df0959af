"""Identity of a run: the part of its spec that decides what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What may change between two launches of one run: where and how it runs and how it is looked at, never what is
# learned. A changed evaluation is done again, nothing else.
_MAY_CHANGE = {
    "runs": None,
    "cluster": None,
    "tracking": None,
    "evaluation": None,
    "multiscale": None,
    "data": {"loader_workers", "cache_dir", "cache_bytes", "max_bad_samples", "root", "shards", "shard_bytes"},
    "training": {
        "micro_batch",
        "keep_last",
        "keep_best",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "validate_every_epochs",
        "validate_on",
        "non_finite",
        "max_skipped_steps",
        "stall_timeout_s",
        "zero_stage",
    },
    "model": {
        "activation_checkpointing",
        "score_threshold",
        "pre_nms_top_k",
        "pre_nms_scope",
        "nms_iou",
        "max_detections",
    },
}


def lasting_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a spec, as JSON values, that must not change from launch to launch."""
    lasting: dict[str, Any] = {}
    for key, value in spec.items():
        exempt = _MAY_CHANGE.get(key, set())
        if exempt is None:
            continue
        if isinstance(value, Mapping):
            value = {name: each for name, each in value.items() if name not in exempt}
        lasting[key] = value
    return lasting


def _is_extended(before: Any, now: Any) -> bool:
    """Return whether only epochs were added, so that the learning rate of all earlier steps is what it was."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return False
    if not all(isinstance(section.get("epochs"), int) for section in (before, now)):
        return False
    known, decays = list(before.get("decay_epochs") or ()), list(now.get("decay_epochs") or ())
    added = decays[len(known) :]
    return (
        now["epochs"] > before["epochs"]
        and decays[: len(known)] == known
        and all(epoch >= before["epochs"] for epoch in added)
    )


def spec_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe what makes two specs different runs, a text for each key: "training.epochs was 3, now 4"."""
    before, now = lasting_part(before), lasting_part(now)
    if _is_extended(before.get("training"), now.get("training")):
        now["training"] = {**now["training"], **{key: before["training"][key] for key in ("epochs", "decay_epochs")}}
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [
                f"{key}.{name} was {old.get(name)!r}, now {new.get(name)!r}"
                for name in sorted({*old, *new})
                if old.get(name) != new.get(name)
            ]
        elif old != new:
            found.append(f"{key} was {old!r}, now {new!r}")
    return found
