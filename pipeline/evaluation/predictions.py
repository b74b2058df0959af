"""Detections from files: a COCO results list, a COCO dataset, JSON lines, and the output of `refinedet predict`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_ROWS_AT_ONCE = 20_000  # as Python objects, about 600 bytes each


def read_predictions(path: str, truth: GroundTruth) -> DetectionTable:
    """Detections of a file, with the image and category ids of `truth`.

    results list  [{image_id, category_id, bbox [x, y, width, height], score}, ...]
    JSON lines    one such row a line
    COCO dataset  {"images", "categories", "annotations": rows with a score}; categories are compared by name
    our own       {file name: [{label, score, box [x1, y1, x2, y2]}, ...]}, as `refinedet predict` writes
    UserError where the file is missing, cut short or none of these. Memory is that of the text and the columns.
    """
    text = _read_text(path)
    start = _skip(text, 0, " \t\r\n\ufeff")
    if text[start : start + 1] == "[":
        return _table_of_rows(_values(text, start + 1, path, closed_by="]"), truth)
    if text[start : start + 1] != "{":
        _refuse(path, f"begins with {text[start : start + 20]!r}" if text[start:] else "is empty")
    first, end = _decode(text, start, path)
    if "image_id" in first:  # JSON lines
        return _table_of_rows(_values(text, start, path, closed_by=""), truth)
    if text[end:].strip():
        _refuse(path, "holds several JSON objects that are no detections")
    if {"images", "annotations"} <= first.keys():
        return _from_dataset(first, truth, path)
    return _table_of_rows(_from_predict(first, truth, path), truth)


def _read_text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode()
    except FileNotFoundError:
        raise UserError(f"detections: there is no file {path}; give the path of a JSON file") from None
    except OSError as error:
        raise UserError(f"detections: {path} cannot be read ({error.strerror or error}); give a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"detections: {path} is not whole JSON ({error}); write or copy it again") from None


def _values(text: str, at: int, path: str, *, closed_by: str) -> Iterator[Any]:
    """The JSON values of a list from behind its bracket, or of JSON lines, one after the other."""
    at = _skip(text, at, " \t\r\n")
    while at < len(text) and text[at] != closed_by:
        value, at = _decode(text, at, path)
        yield value
        at = _skip(text, at, " \t\r\n")
        if not closed_by:
            continue
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1, " \t\r\n")
        elif text[at : at + 1] != closed_by:
            break
    if closed_by and (text[at : at + 1] != closed_by or text[at + 1 :].strip()):
        raise UserError(f"detections: {path} is not whole JSON (at character {at}); write or copy it again")


def _decode(text: str, at: int, path: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"detections: {path} is not whole JSON ({error}); write or copy it again") from None


def _skip(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _table_of_rows(rows: Iterator[Any], truth: GroundTruth) -> DetectionTable:
    tables, batch, first = [], [], 0
    for row in rows:
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            tables.append(truth.table_of(batch, first_row=first))
            first, batch = first + len(batch), []
    return DetectionTable.concatenate([*tables, truth.table_of(batch, first_row=first)])


def _from_dataset(content: Mapping[str, Any], truth: GroundTruth, path: str) -> DetectionTable:
    rows = content["annotations"]
    if not isinstance(rows, list):
        _refuse(path, "has annotations that are no list")
    if rows and not any(isinstance(row, Mapping) and "score" in row for row in rows):
        _refuse(path, "is an annotation file: its annotations have no score")
    ids = dict(zip(truth.names, truth.category_ids.tolist(), strict=True))
    numbers = {one.get("id"): ids.get(one.get("name")) for one in content.get("categories") or ()}
    differing = [one for one in content.get("categories") or () if numbers[one.get("id")] is None]
    if differing:
        named = differing[0].get("name")
        _refuse(path, f"has a category {named!r} that the annotations do not have; use the annotations' categories")
    changed = [
        {**row, "category_id": numbers.get(row.get("category_id"), row.get("category_id"))}
        if isinstance(row, Mapping)
        else row
        for row in rows
    ]
    return _table_of_rows(iter(changed), truth)


def _from_predict(content: Mapping[str, Any], truth: GroundTruth, path: str) -> Iterator[dict[str, Any]]:
    """Rows of {file name: [{label, score, box}]}; files are found by their name below any directory."""
    categories = dict(zip(truth.names, truth.category_ids.tolist(), strict=True))
    images = {
        PurePosixPath(name).name: truth.original_id(number)
        for name, number in zip(truth.file_names, truth.image_ids.tolist(), strict=True)
    }
    for name, found in content.items():
        image = images.get(PurePosixPath(name).name)
        if not isinstance(found, list) or not all(
            isinstance(one, Mapping) and {"label", "score", "box"} <= one.keys() for one in found
        ):
            _refuse(path, f"has {name!r:.80} where images with lists of {{label, score, box}} are expected")
        if image is None:
            _refuse(path, f"has detections of {name!r:.80}, a file that the annotations do not have")
        for one in found:
            if one["label"] not in categories:
                _refuse(path, f"has the label {one['label']!r:.80}, which the annotations do not have")
            x1, y1, x2, y2 = one["box"]
            box = [x1, y1, x2 - x1, y2 - y1]
            yield {"image_id": image, "category_id": categories[one["label"]], "bbox": box, "score": one["score"]}


def _refuse(path: str, fault: str) -> NoReturn:
    raise UserError(
        f"detections: {path} {fault}; give a results list [{{image_id, category_id, bbox, score}}, ...], the same as "
        "JSON lines, a COCO dataset whose annotations have scores, or what `refinedet predict` wrote"
    )
