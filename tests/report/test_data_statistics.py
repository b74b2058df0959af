"""The report's table of the data: the annotations, and the shards' numbers beside them."""

from __future__ import annotations

from pathlib import Path

from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.job_statistics import job_statistics
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.report.data_statistics import statistics_tables
from refinedet.pipeline.runs import storage


def test_what_the_shards_say_stands_beside_the_annotations(tmp_path: Path) -> None:
    data = Data(format="shapes", image_size=64, train=(Split(count=5),), val=(Split(count=3),))
    parts = {part: prepare_shards(data, part, str(tmp_path / part)) for part in ("train", "val")}
    truths = {}
    for part, shards in parts.items():
        write_coco_annotations(shards, str(tmp_path / f"{part}.json"))
        truths[part] = storage.read_json(str(tmp_path / f"{part}.json"))
    found = job_statistics(parts, RefineDetConfig(10, 64))
    rows = dict(statistics_tables(truths, found))
    assert rows["images"] == ["5", "3"]
    assert rows["objects"] == [f"{found['parts'][part]['objects']:,}" for part in parts]
    assert rows["images equal to another"] == ["0", "0"]
    assert len(rows["no anchor overlaps by 0.5 at 64 px"]) == 2
    before = dict(statistics_tables({"val": truths["val"]}, {}))  # a run of an earlier release
    assert before.keys() == rows.keys() - {
        "no anchor overlaps by 0.5 at 64 px",
        "images equal to another",
        "images with an EXIF rotation",
    }
