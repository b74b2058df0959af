"""Forms of detections: pictures, frames, JSON lines, a COCO dataset, YOLO's text, crops, a window.

One class and one entry each. Every class writes as detections come, and holds nothing that grows with boxes.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image
from refinedet.pipeline.inference.choice import Choice
from refinedet.pipeline.inference.pictures import Boxes, draw_detections
from refinedet.pipeline.inference.sources import Frame
from refinedet.pipeline.inference.window import PictureWindow
from refinedet.pipeline.runs.errors import JobError

_QUALITY = 90  # of pictures and crops
_PHOTO_SECONDS = 0.5  # that the window shows a photo at least; a frame of a video has its own time


@dataclass(frozen=True)
class Objects:
    """Detections of one frame, most confident first.

    boxes   [N, 4] float32 xyxy, pixels of the image
    scores  [N] float32
    labels  [N] int64, 1..C
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def select(self, index: np.ndarray) -> Objects:
        return Objects(self.boxes[index], self.scores[index], self.labels[index])


class Output:
    """Files of one format; `names` of the categories, of label 1 first. The threshold bounds what people look at."""

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        self.choice, self.names = choice, names

    def write(self, frame: Frame, found: Objects) -> None:
        """Write the objects of one frame; frames come in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the files."""

    def wait(self) -> None:
        """Leave a person the time to look, after the last frame."""

    @property
    def ended(self) -> bool:
        """True once a person wants no more of it."""
        return False

    def _shown(self, found: Objects) -> Objects:
        return found.select(found.scores >= self.choice.threshold)

    def _file(self, *parts: str) -> Path:
        path = self.choice.output.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Drawn(Output):
    """Images with their objects, drawn beside the detection."""

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        super().__init__(choice, names)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="draw")
        self._waiting: list[tuple[Frame, Future[Image.Image]]] = []

    def write(self, frame: Frame, found: Objects) -> None:
        self._waiting.append((frame, self._pool.submit(self._draw, frame, self._shown(found))))
        if len(self._waiting) > 8:
            self._finish_first()

    def close(self) -> None:
        while self._waiting:
            self._finish_first()
        self._pool.shutdown()

    def _draw(self, frame: Frame, found: Objects) -> Image.Image:
        """Draw one image, enlarged where it is small, or a frame in its own size; in any order."""
        assert frame.image is not None
        style = self.choice.drawing
        return draw_detections(
            frame.image,
            Boxes(found.boxes, found.labels, found.scores if style.scores else None),
            self.names if style.labels else None,
            long_side=640 if frame.number is None else 0,
            line_width=style.line_width,
        )

    def _finish(self, frame: Frame, picture: Image.Image) -> None:
        """Take what was drawn; in order."""

    def _finish_first(self) -> None:
        frame, task = self._waiting.pop(0)
        self._finish(frame, task.result())


class Pictures(Drawn):
    """`STEM.jpg` of each image with its objects, and `STEM.mp4` of each video."""

    _video: tuple[str, cv2.VideoWriter] | None = None

    def close(self) -> None:
        super().close()
        self._end_video()

    def _draw(self, frame: Frame, found: Objects) -> Image.Image:
        picture = super()._draw(frame, found)
        if frame.number is None:
            picture.save(self._file(f"{frame.stem}.jpg"), quality=_QUALITY)
        return picture

    def _finish(self, frame: Frame, picture: Image.Image) -> None:
        if frame.number is None:
            return
        if self._video is None or self._video[0] != frame.source.stem:
            self._end_video()
            path = str(self._file(f"{frame.source.stem}.mp4"))
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._video = frame.source.stem, cv2.VideoWriter(path, code, frame.rate, picture.size)
            if not self._video[1].isOpened():
                raise JobError(f"OpenCV cannot write the video {path}; remove --format pictures.")
        self._video[1].write(cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR))

    def _end_video(self) -> None:
        if self._video is not None:
            self._video[1].release()
        self._video = None


class Frames(Drawn):
    """`frames/STEM/NUMBER.jpg`: each frame of a video with its objects; images have none."""

    def write(self, frame: Frame, found: Objects) -> None:
        if frame.number is not None:
            super().write(frame, found)

    def _draw(self, frame: Frame, found: Objects) -> Image.Image:
        picture = super()._draw(frame, found)
        picture.save(self._file("frames", frame.source.stem, f"{frame.number:06d}.jpg"), quality=_QUALITY)
        return picture


class Shown(Drawn):
    """A window with each picture as it is drawn; the last stays until it is closed. It writes no file."""

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        super().__init__(choice, names)
        self._window = PictureWindow()

    @property
    def ended(self) -> bool:
        return self._window.closed

    def wait(self) -> None:
        while self._waiting:
            self._finish_first()
        self._window.wait()

    def close(self) -> None:
        self._window.close()
        super().close()

    def _finish(self, frame: Frame, picture: Image.Image) -> None:
        self._window.show(picture, frame.name, 1 / frame.rate if frame.rate else _PHOTO_SECONDS)


class JsonLines(Output):
    """`detections.jsonl`: one line per image, with all its objects."""

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        super().__init__(choice, names)
        self._lines = self._file("detections.jsonl").open("w", encoding="utf-8")

    def write(self, frame: Frame, found: Objects) -> None:
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        objects = [
            {"label": self.names[label - 1], "score": round(score, 4), "box": [round(value, 1) for value in box]}
            for box, score, label in _rows(found)
        ]
        self._lines.write(
            json.dumps({"image": frame.name, "width": width, "height": height, "objects": objects}) + "\n"
        )

    def close(self) -> None:
        self._lines.close()


class CocoDataset(Output):
    """`coco.json`: images, categories and annotations with scores, as COCO's tools read them; category 1 is label 1."""

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        super().__init__(choice, names)
        self._file_handle = self._file("coco.json").open("w", encoding="utf-8")
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        self._file_handle.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        self._images: list[dict[str, Any]] = []
        self._count = 0

    def write(self, frame: Frame, found: Objects) -> None:
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        self._images.append({"id": len(self._images) + 1, "file_name": frame.name, "width": width, "height": height})
        for (x1, y1, x2, y2), score, label in _rows(found):
            self._count += 1
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            row = {"id": self._count, "image_id": len(self._images), "category_id": label, "bbox": box}
            row |= {"area": round(box[2] * box[3], 2), "iscrowd": 0, "score": round(score, 5)}
            self._file_handle.write(("," if self._count > 1 else "") + "\n" + json.dumps(row))

    def close(self) -> None:
        self._file_handle.write(f'],\n"images": {json.dumps(self._images)}}}\n')
        self._file_handle.close()


class YoloText(Output):
    """`labels/STEM.txt`: class (from 0), centre x and y, width, height (fractions of the image), score."""

    def write(self, frame: Frame, found: Objects) -> None:
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        lines = [
            f"{label - 1} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f} {score:.4f}\n"
            for (x1, y1, x2, y2), score, label in _rows(self._shown(found))
        ]
        self._file("labels", f"{frame.stem}.txt").write_text("".join(lines))


class Crops(Output):
    """`crops/CATEGORY/STEM-NUMBER.jpg`: the pixels of each object."""

    def write(self, frame: Frame, found: Objects) -> None:
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        for number, ((x1, y1, x2, y2), _, label) in enumerate(_rows(self._shown(found)), 1):
            left, top = max(int(x1), 0), max(int(y1), 0)
            right, bottom = min(int(np.ceil(x2)), width), min(int(np.ceil(y2)), height)
            if right > left and bottom > top:
                category = re.sub(r"[^\w.-]+", "_", self.names[label - 1]) or "unnamed"
                path = self._file("crops", category, f"{frame.stem}-{number}.jpg")
                Image.fromarray(frame.image[top:bottom, left:right]).save(path, quality=_QUALITY)


def _rows(found: Objects):
    return zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)


class Outputs:
    """The outputs of several formats."""

    FORMATS: ClassVar[dict[str, type[Output]]] = {
        "pictures": Pictures,
        "frames": Frames,
        "jsonl": JsonLines,
        "coco": CocoDataset,
        "yolo": YoloText,
        "crops": Crops,
        "window": Shown,
    }

    def __init__(self, choice: Choice, names: tuple[str, ...]) -> None:
        self._outputs = [self.FORMATS[name](choice, names) for name in dict.fromkeys(choice.formats)]

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for output in self._outputs:
            output.close()

    @property
    def ended(self) -> bool:
        """True once a person has closed the window, and so wants no more."""
        return any(output.ended for output in self._outputs)

    def wait(self) -> None:
        for output in self._outputs:
            output.wait()

    def write(self, frame: Frame, found: Objects) -> None:
        for output in self._outputs:
            output.write(frame, found)
