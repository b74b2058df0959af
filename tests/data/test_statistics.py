"""Statistics of shards, the reach of anchors against brute force, duplicates, train beside val; sheets of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from refinedet.model.anchors import tile_anchors
from refinedet.model.boxes import paired_overlaps
from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.config.spec import Augmentation, Data, JobSpec, Split
from refinedet.pipeline.config.spec_files import dump_spec
from refinedet.pipeline.data.images import decode_image
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.data.job_statistics import job_statistics
from refinedet.pipeline.data.order import batch_bounds
from refinedet.pipeline.data.sampling import EpochDraws
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.data.sheets import show_samples
from refinedet.pipeline.data.statistics import best_overlaps, read_statistics
from typer.testing import CliRunner

from tests.data.streams import open_stream


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    """A job of drawn shapes, its shards written."""
    data = Data(format="shapes", image_size=64, train=(Split(count=30),), val=(Split(count=6),))
    spec = JobSpec(name="job", runs=str(tmp_path / "runs"), data=data, model=RefineDetConfig(10, 64), seed=3)
    for part in ("train", "val"):
        prepare_shards(data, part, str(tmp_path / "runs" / "job" / "shards" / part))
    (tmp_path / "job.yaml").write_text(dump_spec(spec))
    return spec


def test_statistics_lie_beside_the_shards_and_count_right(job: JobSpec, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "job" / "shards" / "train"
    found = json.loads((folder / "statistics.json").read_text())
    assert found["images"] == 30
    assert sum(entry["objects"] for entry in found["classes"].values()) == found["objects"] > 30
    assert found["small"] + found["medium"] + found["large"] == found["objects"]
    assert found["image_width"]["max"] == 64
    shards = open_shards(str(folder))
    (folder / "statistics.json").unlink()  # shards of an earlier release
    assert read_statistics(shards) == found


def test_the_best_anchor_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 320, (400, 2, 2)), axis=1).reshape(-1, 4)
    model = RefineDetConfig(20, 320)
    anchors = tile_anchors(320, 320, model.strides)
    expected = paired_overlaps(torch.from_numpy(corners), anchors).amax(1)
    np.testing.assert_allclose(best_overlaps(corners, model), expected, atol=1e-5)


def test_copies_and_images_of_both_parts_are_found(coco_folder: Callable[..., Data], tmp_path: Path) -> None:
    data = coco_folder()  # six times one picture, train and val the same
    parts = {part: prepare_shards(data, part, str(tmp_path / part)) for part in ("train", "val")}
    found = job_statistics(parts, RefineDetConfig(2, 64))
    assert found["parts"]["train"]["duplicates"]["images"] == 5
    assert found["shared"] == {"images": 6, "of": 6, "examples": ["1.jpg", "2.jpg", "3.jpg"]}
    text = "\n".join(found["findings"])
    assert "all 6 images of data.val are in data.train too" in text
    assert "data.train has no object of 1 classes: brush" in text
    assert "5 images whose file equals another's (samples 00000000 = 00000001" in text


def test_stats_and_plan_print_what_is_striking(job: JobSpec, tmp_path: Path) -> None:
    command = ["data", "stats", str(tmp_path / "job.yaml"), "--json", str(tmp_path / "all.json")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    statistics = json.loads((tmp_path / "all.json").read_text())
    assert statistics["shared"]["images"] == 0
    assert {"train", "val"} == statistics["parts"].keys()
    for finding in statistics["findings"]:
        assert finding in done.output
        assert finding[:60] in CliRunner().invoke(app, ["plan", str(tmp_path / "job.yaml")]).output


def test_the_sheet_shows_what_training_is_given(job: JobSpec, tmp_path: Path) -> None:
    shards = open_shards(str(tmp_path / "runs" / "job" / "shards" / "train"))
    sheets = []
    for override, option in (([], []), (["data.augmentation.distort=false"], []), ([], ["--plain"])):
        changes = {"augmentation": Augmentation(distort=not override)}
        shown, expected = tmp_path / "shown.png", tmp_path / "expected.png"
        command = ["data", "show", str(tmp_path / "job.yaml"), *override, "--output", str(shown), *option]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        data = job.data.model_copy(update=changes)
        show_samples(shards, str(expected), data, sizes=(64,), global_batch=32, seed=3, plain=bool(option))
        assert shown.read_bytes() == expected.read_bytes()
        sheets.append(shown.read_bytes())
    assert len(set(sheets)) == 3
    show_samples(shards, str(tmp_path / "small.png"), job.data, sizes=(128,), global_batch=4, count=7, columns=3)
    sheet, _ = decode_image((tmp_path / "small.png").read_bytes())
    assert sheet is not None
    assert sheet.shape == (3 * (128 + 22), 3 * 132, 3)


@pytest.mark.parametrize("mosaic", [False, True])
def test_the_sheet_of_multi_scale_training_shows_the_sizes_of_its_batches(
    job: JobSpec, tmp_path: Path, mosaic: bool
) -> None:
    overrides = ["training.input_sizes=[64,128]", "training.global_batch=8", f"data.augmentation.mosaic={mosaic}"]
    command = ["data", "show", str(tmp_path / "job.yaml"), *overrides, "--count", "15"]
    command += ["--output", str(tmp_path / "shown.png")]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    shards = open_shards(str(tmp_path / "runs" / "job" / "shards" / "train"))
    window, streams = job.data.shuffle_window, job.data.canonical_streams
    options = {"seed": 3, "global_batch": 8, "epochs": 1, "shuffle_window": window, "canonical_streams": streams}
    stream = open_stream(shards, input_size=(64, 128), augmentation=Augmentation(mosaic=mosaic), **options)
    draws = EpochDraws(shards.sizes, None, seed=3, epoch=0, window=window, streams=streams)
    sheet, _ = decode_image((tmp_path / "shown.png").read_bytes())
    assert sheet is not None
    sides = set()
    for row, batch in zip(range(3), stream, strict=False):
        side = batch.images.shape[-1]
        sides.add(side)
        top = row * (128 + 22) + 2
        start, _ = batch_bounds(row, draws.num_draws, stream.batches_per_epoch)
        first = batch.images[batch.keys.index(shards.key(int(draws.stretch(start, start + 1)[0][0])))]
        shown = sheet[top : top + side, 2 : side + 2].astype(int)
        assert (np.abs(shown - first.permute(1, 2, 0).numpy()).max(-1) > 0).mean() < 0.5  # but for drawn boxes
    assert sides == {64, 128}


def test_each_class_has_its_contact_sheet(job: JobSpec, tmp_path: Path) -> None:
    folder = tmp_path / "sheets"
    command = ["data", "show", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, [*command, "--classes", str(folder)], catch_exceptions=False)
    written = sorted(path.name for path in folder.iterdir())
    counts = read_statistics(open_shards(str(tmp_path / "runs" / "job" / "shards" / "train")))["classes"]
    assert len(written) == sum(1 for entry in counts.values() if entry["objects"])
    assert all(name in done.output for name in written)
    assert all(decode_image(path.read_bytes())[1] is None for path in folder.iterdir())
