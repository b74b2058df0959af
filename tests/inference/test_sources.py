"""Every named source is read: files, directories, patterns, lists, standard input, URLs, videos."""

from __future__ import annotations

import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from refinedet.pipeline.inference.sources import find_sources, read_frames
from refinedet.pipeline.runs.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/a.jpg, photos/b.png, photos/sub/a.jpg, photos/notes.md, each image of a colour of its own."""
    directory = tmp_path / "photos"
    (directory / "sub").mkdir(parents=True)
    for value, name in enumerate(("a.jpg", "b.png", "sub/a.jpg")):
        cv2.imwrite(str(directory / name), np.full((24, 32, 3), 60 * value, np.uint8))
    (directory / "notes.md").write_text("no image")
    return directory


def found(*names: object, leave_out: Path = Path("/nowhere")) -> list[tuple[str, str]]:
    return [
        (source.path, source.stem) for source in find_sources([str(name) for name in names], leave_out=str(leave_out))
    ]


def test_a_directory_stands_for_all_images_below_it(photos: Path) -> None:
    expected = [(f"{photos}/a.jpg", "a"), (f"{photos}/b.png", "b"), (f"{photos}/sub/a.jpg", "sub/a")]
    assert found(photos) == expected


def test_names_that_coincide_are_numbered(photos: Path) -> None:
    assert [stem for _, stem in found(photos / "a.jpg", photos / "sub" / "a.jpg", photos / "a.jpg")] == [
        "a",
        "a-2",
        "a-3",
    ]
    (photos / "A.png").write_bytes((photos / "b.png").read_bytes())
    assert [stem for _, stem in found(photos / "a.jpg", photos / "A.png")] == ["a", "A-2"], "some systems ignore case"


def test_patterns_lists_and_standard_input(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [path for path, _ in found(photos / "**" / "*.jpg")] == [f"{photos}/a.jpg", f"{photos}/sub/a.jpg"]
    (photos / "list.txt").write_text(f"{photos}/b.png\n\n  {photos}/a.jpg \n")
    assert [path for path, _ in found(photos / "list.txt")] == [f"{photos}/b.png", f"{photos}/a.jpg"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/sub/a.jpg\n"))
    assert found("-") == [(f"{photos}/sub/a.jpg", "a")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(photos: Path) -> None:
    (photos / "[1].jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert found(photos / "[1].jpg") == [(f"{photos}/[1].jpg", "_1_")]


def test_the_output_is_no_source(photos: Path) -> None:
    assert [stem for _, stem in found(photos, leave_out=photos / "sub")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.jpg", "does not exist"),
        ("*.gif", "matches no file"),
        ("empty", "holds no image"),
        ("empty.txt", "no image"),
        ("binary.txt", "no text file of names"),
    ],
)
def test_what_stands_for_nothing_is_refused(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=said):
        found(tmp_path / name)


def test_images_come_in_order_and_a_bad_one_is_named(photos: Path) -> None:
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:60])
    (photos / "list.txt").write_text(f"{photos}/a.jpg\n{photos}/b.png\n{photos}/absent.jpg\n{photos}/sub/a.jpg\n")
    frames = list(read_frames(find_sources([str(photos / "list.txt")], leave_out="/nowhere"), ahead=2))
    means = [None if frame.image is None else round(float(frame.image.mean())) for frame in frames]
    assert means == [0, None, None, 120]
    assert "decoder" in (frames[1].fault or "")
    assert frames[2].fault == "does not exist"


@pytest.mark.parametrize("name", ["nonsense://x/y.jpg", "http://[bad/x.jpg", "http://127.0.0.1:1/x.jpg", "."])
def test_a_line_of_a_list_that_cannot_be_read_has_a_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.txt").write_text(f"{name}\n")
    (frame,) = read_frames(find_sources([str(tmp_path / "list.txt")], leave_out="/nowhere"), ahead=1)
    assert frame.image is None
    assert frame.fault


def test_what_a_store_raises_is_a_reason(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(path: str) -> bytes:
        raise RuntimeError("Unable to locate\ncredentials")

    monkeypatch.setattr("refinedet.pipeline.runs.storage.read_bytes", read_bytes)
    (frame,) = read_frames(find_sources([str(photos / "a.jpg")], leave_out="/nowhere"), ahead=1)
    assert frame.fault == "Unable to locate credentials"


def test_a_video_is_its_frames(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 12.0, (64, 48))
    for number in range(20):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    sources = find_sources([str(tmp_path)], leave_out="/nowhere")
    assert [(source.stem, source.count) for source in sources] == [("broken", 1), ("clip", 20)]
    broken, *frames = read_frames(sources, ahead=4)
    assert broken.fault == "no frame of the video can be decoded"
    assert [frame.number for frame in frames] == list(range(20))
    assert [frame.stem for frame in frames[:2]] == ["clip#000000", "clip#000001"]
    assert {frame.rate for frame in frames} == {12.0}
    means = [float(frame.image.mean()) for frame in frames if frame.image is not None]
    np.testing.assert_allclose(means, [10 * number for number in range(20)], atol=6)
    (source,) = find_sources([str(tmp_path / "clip.mp4")], leave_out="/nowhere", every=3)
    some = list(read_frames([source], ahead=4))
    assert [frame.number for frame in some] == list(range(0, 20, 3))
    assert source.count == len(some)
    assert {frame.rate for frame in some} == {4.0}


def test_no_more_images_are_decoded_than_asked_for(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Path.read_bytes

    def read_bytes(path: str) -> bytes:
        read.append(path)
        return original(Path(path))

    monkeypatch.setattr("refinedet.pipeline.runs.storage.read_bytes", read_bytes)
    frames = read_frames(find_sources([str(photos / "a.jpg")] * 50, leave_out="/nowhere"), ahead=4)
    next(frames)
    assert len(read) <= 5
    frames.close()


@pytest.fixture
def server(photos: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(photos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_url_is_fetched(server: str) -> None:
    sources = find_sources([f"{server}/b.png", f"{server}/sub/a.jpg?size=large"], leave_out="/nowhere")
    assert [source.stem for source in sources] == ["b", "a"]
    frames = list(read_frames(sources, ahead=2))
    assert [round(float(frame.image.mean())) for frame in frames if frame.image is not None] == [60, 120]
    (absent,) = read_frames(find_sources([f"{server}/absent.jpg"], leave_out="/nowhere"), ahead=1)
    assert absent.image is None
    assert absent.fault == "does not exist"


def test_a_video_at_a_url_is_its_frames(server: str, photos: Path) -> None:
    writer = cv2.VideoWriter(str(photos / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.0, (64, 48))
    for number in range(20):
        writer.write(np.full((48, 64, 3), 10 * number, np.uint8))
    writer.release()
    (source,) = find_sources([f"{server}/clip.avi?token=1"], leave_out="/nowhere")
    frames = list(read_frames([source], ahead=2))
    assert (source.stem, [frame.number for frame in frames]) == ("clip", list(range(20)))


def test_a_stream_is_a_video_and_one_that_does_not_answer_has_a_reason() -> None:
    (source,) = find_sources(["rtsp://127.0.0.1:1/camera"], leave_out="/nowhere")
    assert (source.is_video, source.stem, source.count) == (True, "camera", 1)
    (frame,) = read_frames([source], ahead=1)
    assert frame.fault == "no frame of the video can be decoded"


def test_a_screen_that_is_not_there_has_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # where Pillow looks for programs that take pictures
    (frame,) = read_frames(find_sources(["screen"], leave_out="/nowhere"), ahead=1)
    assert frame.image is None
    assert frame.fault


def test_the_screen_is_an_image(display: str) -> None:
    (frame,) = read_frames(find_sources(["screen"], leave_out="/nowhere"), ahead=1)
    assert frame.image is not None, frame.fault
    assert frame.image.shape == (480, 640, 3)
    assert frame.image.max() == 0  # an empty desktop
