"""From a directory of a user's own data to a trained detector with `refinedet init` and `refinedet launch` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.drills.bench import Bench

from tests.cluster.commands import run_commands
from tests.data import test_formats as formats

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(
    "write", [formats.write_yolo_flat, formats.write_voc_export, formats.write_labelme, formats.write_plain_parquet]
)
def test_a_directory_becomes_a_trained_detector(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, dict[str, bytes]], tuple[str, Split]],
) -> None:
    boxes = [("owl", (8.0, 6.0, 40.0, 36.0))]
    monkeypatch.setattr(formats, "TRUTH", {f"{number:02d}.jpg": boxes for number in range(12)})
    pixels = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    names = zip(formats.TRUTH, pixels, strict=True)
    write(tmp_path / "photos", {name: cv2.imencode(".jpg", picture)[1].tobytes() for name, picture in names})
    short = [
        "training.epochs=1",
        "training.warmup_epochs=0",
        "training.decay_epochs=[]",
        "--address",
        bench.cluster.address,
    ]
    init, launch = run_commands([["init", "photos"], ["launch", "photos.yaml", *short]], cwd=tmp_path)
    assert (init.status, launch.status) == (0, 0), init.stderr + launch.stderr
    assert "next: refinedet launch photos.yaml" in init.stdout
    assert "every tenth image is held out" in init.stdout
    for stage in ("prepare", "train", "evaluate", "report"):
        assert f"✓ {stage}" in launch.stdout
    for name in ("weights.safetensors", "report.html", "metrics.json"):
        assert (tmp_path / "runs" / "photos" / name).stat().st_size
