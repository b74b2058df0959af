"""Images of an evaluation that could not be decoded: counted, named, and limited once for the whole evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from refinedet.pipeline.data.samples import Sample
from refinedet.pipeline.runs.errors import UserError

_NAMED = 5  # in a sentence; metrics.json names all


@dataclass(frozen=True, order=True)
class UnreadableImage:
    """An image without detections, because it could not be decoded completely."""

    image_id: int
    file_name: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Fields by name, as in metrics.json and in the header of a chunk."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file_name or self.image_id} ({self.reason})"


class ReadableSamples:
    """Iterates over the samples that were decoded completely; `unreadable` collects the others."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples
        self.unreadable: list[UnreadableImage] = []

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            if sample.fault is None:
                yield sample
            else:
                reason = sample.fault.reason.removeprefix(f"{sample.file_name}: ")
                self.unreadable.append(UnreadableImage(sample.image_id, sample.file_name, reason))


def sum_unreadable(parts: Iterable[Iterable[UnreadableImage]], limit: int) -> tuple[UnreadableImage, ...]:
    """Unreadable images of all chunks, each once, by image id.

    parts  of any number of chunks or ranks, in any order
    limit  `data.max_bad_samples`, of the whole evaluation
    Raises UserError where there are more than `limit`.
    """
    found = {image.image_id: image for part in parts for image in part}
    images = tuple(found[image_id] for image_id in sorted(found))
    if len(images) > limit:
        raise UserError(
            f"{len(images)} images cannot be read, data.max_bad_samples allows {limit}: {name_images(images)}; "
            "fix the data set, or raise data.max_bad_samples"
        )
    return images


def name_images(images: tuple[UnreadableImage, ...]) -> str:
    """The first images in words, and how many more there are."""
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return "; ".join(str(image) for image in images[:_NAMED]) + more


def unreadable_to_json(images: tuple[UnreadableImage, ...]) -> dict[str, Any]:
    """The entry "unreadable" of an evaluation in metrics.json: {"count", "images": [{image_id, file_name, reason}]}."""
    return {"count": len(images), "images": [image.to_json() for image in images]}
