"""A training stream from loose options: those of the spec's section `data` by their keys, the rest as they are."""

from __future__ import annotations

from typing import Any

from refinedet.pipeline.config.batches import divide_batch
from refinedet.pipeline.config.spec import Augmentation, Data
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.stream import TrainingStream

PLAIN = Augmentation(**dict.fromkeys(Augmentation.model_fields, False))


def open_stream(shards: ShardSet, **options: Any) -> TrainingStream:
    chosen = {key: options.pop(key) for key in [*options] if key in Data.model_fields and key != "seed"}
    defaults: dict[str, Any] = {"format": "shapes", "loader_workers": 0, "shuffle_window": 4096}
    batch = divide_batch(options.pop("global_batch"), options.pop("micro_batch", None), options.pop("world_size", 1))
    return TrainingStream(shards, Data.model_validate({**defaults, **chosen}), batch=batch, **options)
