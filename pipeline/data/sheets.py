"""Pictures of shards: samples as the job trains on them, and a contact sheet of the objects of each class."""

from __future__ import annotations

import re
from collections.abc import Iterator

import cv2
import numpy as np
from refinedet.pipeline.config.spec import Data
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.order import batch_bounds, count_batches
from refinedet.pipeline.data.randomness import keyed_permutation
from refinedet.pipeline.data.reading import SampleReader
from refinedet.pipeline.data.samples import Sample
from refinedet.pipeline.data.sampling import EpochDraws, expected_repeats
from refinedet.pipeline.data.stream_steps import Augmenter, Turn, load_turn
from refinedet.pipeline.runs import storage

_CAPTION = 18  # pixels
_OBJECT = 144
"""side of a tile of a contact sheet, pixels"""
_OBJECTS_SHOWN = 48
"""on a contact sheet"""
_MARGIN = 0.25
"""of the box's sides, around an object of a contact sheet"""
_WHITE = 255


def show_samples(
    shards: ShardSet,
    output: str,
    data: Data,
    *,
    sizes: tuple[int, ...],
    global_batch: int,
    seed: int = 0,
    plain: bool = False,
    count: int = 20,
    columns: int = 5,
) -> None:
    """Write a sheet (PNG) of samples of a job's first epoch, views, sizes and order as in training.

    They are the first of the epoch; where global batches have several `sizes`, each row holds the first of another.

    sizes  of the views, pixels: of each global batch one
    seed   the job's
    plain  the resized images without augmentation, as evaluation sees them
    """
    repeats = expected_repeats(shards, data.train, data.sampling) if shards.part == "train" else None
    draws = EpochDraws(
        shards.sizes, repeats, seed=seed, epoch=0, window=data.shuffle_window, streams=data.canonical_streams
    )
    view = Augmenter(sizes, seed, None if plain else data.augmentation, data.include_difficult)
    reader = SampleReader(shards)
    tiles = []
    for turn in _first_turns(draws, global_batch, count, columns if len(sizes) > 1 else count):
        sample, found = (loaded := load_turn(turn, reader)).sample, view(loaded)
        image = _draw_boxes(found.image, found.boxes, found.labels, shards)
        tiles.append(_caption(image, f"{sample.key}  {sample.file_name}"))
    _write_sheet(output, tiles, columns)


def _first_turns(draws: EpochDraws, global_batch: int, count: int, per_batch: int) -> Iterator[Turn]:
    """`count` turns of an epoch, of each global batch the first `per_batch`."""
    num_batches = count_batches(draws.num_draws, global_batch)
    for index in range(num_batches):
        start, stop = batch_bounds(index, draws.num_draws, num_batches)
        stop = min(stop, start + per_batch, start + count)
        beside = draws.companions(start, stop, global_batch).T.tolist() if stop > start else []
        for position, occurrence, others in zip(*draws.stretch(start, stop), beside, strict=True):
            yield Turn(
                int(position), draws.epoch, index, 0, last=True, occurrence=int(occurrence), companions=tuple(others)
            )
        count -= stop - start


def show_classes(shards: ShardSet, directory: str, *, seed: int = 0) -> list[str]:
    """Write a contact sheet (PNG) for each class that has objects: some of them, drawn at random; returns the paths."""
    reader = SampleReader(shards)
    positions, labels, numbers = _learnt_objects(shards)
    paths = []
    for label in np.unique(labels).tolist():
        own = np.flatnonzero(labels == label)
        chosen = own[keyed_permutation(len(own), "contact sheet", seed, label)[:_OBJECTS_SHOWN]]
        tiles = [
            _cut_object(reader.read(position), number)
            for position, number in zip(positions[chosen].tolist(), numbers[chosen].tolist(), strict=True)
        ]
        name = re.sub(r"[^\w.-]+", "_", shards.categories[label - 1].name)
        paths.append(storage.join(directory, f"{label:03d}-{name}.png"))
        _write_sheet(paths[-1], tiles, columns=8)
    return paths


def _learnt_objects(shards: ShardSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position of its sample, label, and number within `Sample.boxes`, of every object to train on."""
    ids = np.array([category.id for category in shards.categories])
    found = [np.zeros((0, 3), np.int64)]
    for shard in range(len(shards)):
        columns = shards.read_columns(shard, "num_objects", "category_ids", "learnt")
        position = np.repeat(np.arange(len(columns["num_objects"])), columns["num_objects"])[columns["learnt"]]
        number = np.arange(len(position)) - np.searchsorted(position, position)
        label = np.searchsorted(ids, columns["category_ids"][columns["learnt"]]) + 1
        found.append(np.stack([position + shards.first[shard], label, number], 1))
    positions, labels, numbers = np.concatenate(found).T
    return positions, labels, numbers


def _cut_object(sample: Sample, number: int) -> np.ndarray:
    """A tile with one object of an image, its box and some margin."""
    boxes = sample.boxes[~sample.crowd]
    if number >= len(boxes):  # the image cannot be decoded
        return _caption(np.full((_OBJECT, _OBJECT, 3), 127, np.uint8), f"{sample.key}: damaged")
    height, width, _ = sample.image.shape
    x1, y1, x2, y2 = boxes[number]
    margin = max(x2 - x1, y2 - y1) * _MARGIN
    left, top = int(max(x1 - margin, 0)), int(max(y1 - margin, 0))
    right, bottom = int(np.ceil(min(x2 + margin, width))), int(np.ceil(min(y2 + margin, height)))
    scale = _OBJECT / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    cut = cv2.resize(sample.image[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
    corners = ((boxes[number] - [left, top, left, top]) * scale).round().astype(int).tolist()
    cv2.rectangle(cut, corners[:2], corners[2:], (255, 60, 60), 1)
    tile = np.full((_OBJECT, _OBJECT, 3), _WHITE, np.uint8)
    tile[: size[1], : size[0]] = cut
    return _caption(tile, f"{sample.key} {round(x2 - x1)}x{round(y2 - y1)}")


def _draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, shards: ShardSet) -> np.ndarray:
    image = image.copy()
    for box, label in zip(boxes, labels.tolist(), strict=True):
        colour = _colour_of_label(label)
        x1, y1, x2, y2 = (round(float(value)) for value in box)
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), colour, 2)
        name = shards.categories[label - 1].name
        cv2.putText(image, name, (x1 + 3, y1 + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(image, name, (x1 + 3, y1 + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
    return image


def _caption(image: np.ndarray, text: str) -> np.ndarray:
    height, width, _ = image.shape
    tile = np.full((height + _CAPTION + 4, width + 4, 3), _WHITE, np.uint8)
    tile[2 : height + 2, 2 : width + 2] = image
    cv2.putText(tile, text, (4, height + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (60, 60, 60), 1, cv2.LINE_AA)
    return tile


def _write_sheet(output: str, tiles: list[np.ndarray], columns: int) -> None:
    columns = min(columns, len(tiles))
    tiles = _of_one_size(tiles)
    sheet = np.vstack([np.hstack(row) for row in _rows(tiles, columns)])
    storage.write_bytes(output, cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())


def _of_one_size(tiles: list[np.ndarray]) -> list[np.ndarray]:
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))

    def border(tile: np.ndarray) -> np.ndarray:
        edges = (0, height - tile.shape[0], 0, width - tile.shape[1])
        return cv2.copyMakeBorder(tile, *edges, cv2.BORDER_CONSTANT, value=(_WHITE,) * 3)

    return [border(tile) for tile in tiles]


def _rows(tiles: list[np.ndarray], columns: int) -> Iterator[list[np.ndarray]]:
    blank = np.full_like(tiles[0], _WHITE)
    for at in range(0, len(tiles), columns):
        row = tiles[at : at + columns]
        yield row + [blank] * (columns - len(row))


def _colour_of_label(label: int) -> tuple[int, int, int]:
    """A bright RGB colour for each label, neighbours far apart."""
    hue = np.array([[[label * 67 % 180, 190, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue
