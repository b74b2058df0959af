"""The window of `refinedet predict`, on a display without a monitor, closed by a key as a person would."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageGrab
from refinedet.pipeline.inference.choice import Choice
from refinedet.pipeline.inference.predict import Tally, predict_sources
from refinedet.pipeline.inference.sources import find_sources
from refinedet.pipeline.inference.window import PictureWindow
from refinedet.pipeline.runs.errors import UserError

from tests.inference.test_predict import KnownDetector

pytest.importorskip("tkinter", reason="needs Python's tkinter")
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


class Person(threading.Thread):
    """Somebody at the display, who presses q once `leave` is true of the colours seen in its middle.

    seen  the colours in the order they came, without black, the empty desktop
    """

    def __init__(self, display: str, leave: Callable[[list[tuple[int, ...]]], bool]) -> None:
        super().__init__(daemon=True)
        self.display, self.leave = display, leave
        self.seen: list[tuple[int, ...]] = []
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while not self.leave(self.seen) and time.monotonic() < deadline:
            screen = np.asarray(ImageGrab.grab(xdisplay=self.display))
            colour = tuple(int(value) for value in screen[200, 300])
            if colour != (0, 0, 0) and colour not in self.seen:
                self.seen.append(colour)
            time.sleep(0.05)
        subprocess.run(["xdotool", "mousemove", "300", "200", "key", "q"], check=True, timeout=30)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos, each of one colour; larger than the display."""
    (tmp_path / "photos").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (1000, 800), colour).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def predict(source: Path, output: Path, *formats: str) -> Tally:
    sources = find_sources([str(source)], leave_out=str(output))
    return predict_sources(KnownDetector(), sources, Choice(output, formats))  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not shutil.which("xdotool"), reason="needs xdotool, which presses keys")
def test_photos_follow_one_another_and_the_last_stays_until_it_is_closed(
    photos: Path, tmp_path: Path, display: str
) -> None:
    began = time.monotonic()
    person = Person(display, lambda seen: len(seen) == 3 and time.monotonic() > began + 2.5)
    tally = predict(photos, tmp_path / "out", "window")
    person.join()
    assert person.seen == COLOURS
    assert (tally.images, tally.ended) == (3, False)
    assert time.monotonic() > began + 2.5
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("xdotool"), reason="needs xdotool, which presses keys")
def test_closing_it_ends_a_prediction_whose_files_are_whole(tmp_path: Path, display: str) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(100):
        Image.new("RGB", (64, 48), COLOURS[0]).save(tmp_path / "photos" / f"{number:03}.png")
    person = Person(display, lambda seen: bool(seen))
    tally = predict(tmp_path / "photos", tmp_path / "out", "window", "jsonl")
    person.join()
    assert tally.ended
    assert 0 < tally.images < 100
    lines = (tmp_path / "out" / "detections.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"][-7:-4] for line in lines] == [f"{number:03}" for number in range(tally.images)]


@pytest.mark.usefixtures("display")
def test_it_is_not_waited_for_where_no_image_could_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    tally = predict(tmp_path / "photos", tmp_path / "out", "window")
    assert (tally.images, tally.unreadable, tally.ended) == (0, 1, False)


def test_without_a_display_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(UserError, match="display"):
        PictureWindow()
