"""Images to detect in, from what people name: files, directories, patterns, lists, videos, URLs, the screen."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np
from PIL import ImageGrab
from refinedet.pipeline.data.image_files import list_sizes
from refinedet.pipeline.data.images import SUFFIXES, decode_image, read_header, turn_upright
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
STREAM_SCHEMES = ("rtmp://", "rtsp://", "rtsps://")
STREAM_SUFFIXES = (".m3u8", ".mjpeg", ".mjpg")  # at http
STANDARD_INPUT = "-"
SCREEN = "screen"


@dataclass(frozen=True)
class Source:
    """A file to detect in.

    path   local path or URI
    stem   of the files written for it: unique among the sources, without suffix, with `/` where it lay in a directory
    count  images in it: 1, or the frames of a video that are read, as its header states them
    every  of a video, read one frame in so many
    """

    path: str
    stem: str
    count: int = 1
    every: int = 1

    @property
    def is_video(self) -> bool:
        return _is_video(self.path)


@dataclass(frozen=True)
class Frame:
    """An image, or a frame of a video.

    number  of the frame, from 0; None for an image
    rate    frames per second of the video, 0 for an image
    image   uint8 [H, W, 3] RGB; None where it cannot be read
    fault   why not
    """

    source: Source
    image: np.ndarray | None
    fault: str | None = None
    number: int | None = None
    rate: float = 0.0

    @property
    def name(self) -> str:
        """Name in the results: the path, for a video with the frame's number."""
        return self.source.path if self.number is None else f"{self.source.path}#{self.number}"

    @property
    def stem(self) -> str:
        return self.source.stem if self.number is None else f"{self.source.stem}#{self.number:06d}"  # as no stem has


def find_sources(names: Sequence[str], *, leave_out: str, every: int = 1) -> list[Source]:
    """Expand names, in their order.

    names      files, directories (all images and videos below), patterns (`photos/**/*.jpg`), URLs, text files with one
               name per line, "-" for names from standard input, "screen" for a picture of it (./screen is a file)
    leave_out  directory whose files are not read: the output's
    every      of videos, read one frame in so many
    Raises UserError for a name that stands for nothing; what a list names is looked up only when it is read.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        if name == STANDARD_INPUT or name.lower().endswith(".txt"):
            found += [(line, os.path.basename(line)) for line in _lines(name)]
        else:
            found += _expand(name)
    outputs = storage.absolute(leave_out).rstrip("/") + "/"
    paths = [(path, stem) for path, stem in found if not storage.absolute(path).startswith(outputs)]
    if not paths:
        raise UserError("There is no image to detect in; give image files, directories, patterns, URLs or videos.")
    taken: set[str] = set()
    return [Source(path, _unique(os.path.splitext(stem)[0], taken), _count(path, every), every) for path, stem in paths]


def read_frames(sources: Iterable[Source], *, ahead: int, exif: str = "stored") -> Iterator[Frame]:
    """Yield the images of the sources in order. `ahead` are decoded beside, so that memory does not grow with them.

    exif  of photos with a rotation, as `RefineDet.exif`
    An image or video that cannot be read is a frame with a fault.
    """
    remaining = iter(sources)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode") as pool:
        waiting = deque((source, _begin(pool, source, exif)) for source in islice(remaining, ahead))
        while waiting:
            source, task = waiting.popleft()
            yield from _read_video(source) if task is None else [task.result()]
            waiting.extend((following, _begin(pool, following, exif)) for following in islice(remaining, 1))


def _begin(pool: ThreadPoolExecutor, source: Source, exif: str):
    return None if source.is_video else pool.submit(_read_image, source, exif)


def _read_image(source: Source, exif: str) -> Frame:
    try:
        if source.path == SCREEN:
            return Frame(source, np.asarray(ImageGrab.grab().convert("RGB")))
        content = storage.read_bytes(source.path)
        image, fault = decode_image(content)
        if image is not None and exif == "displayed" and (header := read_header(content)):
            image = turn_upright(image, header.orientation)
    except FileNotFoundError:
        image, fault = None, "does not exist"
    except Exception as error:  # libraries of remote storage raise what they like
        image, fault = None, getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or repr(error)
    return Frame(source, image, fault)


def _read_video(source: Source) -> Iterator[Frame]:
    video = cv2.VideoCapture(source.path)
    try:
        rate = (video.get(cv2.CAP_PROP_FPS) or 25.0) / source.every
        number = 0
        while video.grab():
            if number % source.every == 0:
                complete, pixels = video.retrieve()
                if not complete:
                    break
                yield Frame(source, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), None, number, rate)
            number += 1
        if number == 0:
            yield Frame(source, None, "no frame of the video can be decoded")
    finally:
        video.release()


def _lines(name: str) -> list[str]:
    if name == STANDARD_INPUT:
        lines = sys.stdin.read().splitlines()
    else:
        try:
            lines = storage.read_bytes(name).decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{name!r} is no text file of names, one per line, in UTF-8; correct it.") from None
    return [line.strip() for line in lines if line.strip()]


def _expand(name: str) -> list[tuple[str, str]]:
    """Path and name below its directory of all that `name` stands for."""
    if name == SCREEN:
        return [(name, name)]
    if name.lower().startswith(STREAM_SCHEMES):
        return [(name, os.path.basename(name.partition("?")[0].rstrip("/")))]
    if storage.is_local(name):
        if os.path.isdir(name):
            return _below(name)
        if os.path.exists(name):
            return [(name, os.path.basename(name))]
        found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        if not found:
            kind = "matches no file" if glob.has_magic(name) else "does not exist"
            raise UserError(f"{name!r} {kind}; give an image, a directory, a pattern, a list or a URL.")
        return [(path, os.path.basename(path)) for path in found]
    last = name.rstrip("/").rpartition("/")[2].partition("?")[0]
    if "." in last or name.startswith(("http://", "https://")):
        return [(name, last or "image")]
    return _below(name)


def _below(directory: str) -> list[tuple[str, str]]:
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES) if storage.is_local(directory) else SUFFIXES
    names = [name for name in list_sizes(directory) if name.lower().endswith(suffixes)]
    if not names:
        raise UserError(f"The directory {directory!r} holds no image (JPEG, PNG or WebP) and no video.")
    return [(storage.join(directory, name), name) for name in names]


def _unique(stem: str, taken: set[str]) -> str:
    """A path below the output directory that no other source has: `photo`, then `photo-2`."""
    base = (
        "/".join(re.sub(r"[^\w.-]+", "_", part) for part in stem.split("/") if part not in ("", ".", "..")) or "image"
    )
    stem, number = base, 1
    while stem.lower() in taken:  # file systems that ignore case exist
        number += 1
        stem = f"{base}-{number}"
    taken.add(stem.lower())
    return stem


def _is_video(path: str) -> bool:
    """Recognise a video or stream, which OpenCV reads; a URL may have a query after its name."""
    if "://" not in path:
        return path.lower().endswith(VIDEO_SUFFIXES)
    name = path.lower().partition("?")[0]
    return name.startswith(STREAM_SCHEMES) or name.endswith((*VIDEO_SUFFIXES, *STREAM_SUFFIXES))


def _count(path: str, every: int) -> int:
    if not _is_video(path) or path.lower().startswith(STREAM_SCHEMES):  # a stream is opened once, and has no count
        return 1
    video = cv2.VideoCapture(path)
    try:
        return max(1, -(-int(video.get(cv2.CAP_PROP_FRAME_COUNT)) // every))
    finally:
        video.release()
