"""The formats of data sets, and how the splits of one part become one list of records.

A format is one file, and one entry in `READERS`. Its reader gives what the files of a split hold; this module gives all
formats the same treatment: classes are selected and numbered, ids made unique, boxes checked.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from refinedet.pipeline.config.spec import Data, DataFormat, Split
from refinedet.pipeline.data.annotations import Annotations, Record, SplitSource, fault_of_box
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.coco import coco_lists, read_coco
from refinedet.pipeline.data.cvat import cvat_lists, read_cvat
from refinedet.pipeline.data.hub_data import PREFIX, is_hub
from refinedet.pipeline.data.huggingface import huggingface_lists, read_huggingface
from refinedet.pipeline.data.image_tars import image_tar_lists, read_image_tars
from refinedet.pipeline.data.labelme import labelme_lists, read_labelme
from refinedet.pipeline.data.numbering import Numbering
from refinedet.pipeline.data.randomness import keyed_integer
from refinedet.pipeline.data.remote import exists
from refinedet.pipeline.data.samples import BadSample, Category
from refinedet.pipeline.data.voc import read_voc, voc_lists
from refinedet.pipeline.data.yolo import read_yolo, yolo_lists
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """Reader of one data format.

    read(root, split, faults) -> SplitSource
        The images and objects of a split. Faults of single images and objects are added to `faults`, and what they
        concern is excluded; a data set that cannot be read at all raises `UserError`. Image bytes are not read here:
        a record's `load` reads them, in another thread or process. Category, image and annotation ids are the data
        set's own with `fixed_ids`, and else count from 1.
    lists(root, split) -> (name, path) of every file that defines the images and objects of the split
        Their contents decide whether shards that exist are those of the data set as it is now.
    """

    read: Callable[[str, Split, FaultLog], SplitSource]
    lists: Callable[[str, Split], Iterable[tuple[str, str]]]


READERS: dict[DataFormat, Reader] = {
    "coco": Reader(read_coco, coco_lists),
    "lvis": Reader(read_coco, coco_lists),
    "voc": Reader(read_voc, voc_lists),
    "yolo": Reader(read_yolo, yolo_lists),
    "labelme": Reader(read_labelme, labelme_lists),
    "cvat": Reader(read_cvat, cvat_lists),
    "huggingface": Reader(read_huggingface, huggingface_lists),
    "webdataset": Reader(read_image_tars, image_tar_lists),
}


def root_of(data: Data, split: Split) -> str:
    """Root directory of a split's data set; UserError where it does not exist."""
    root = split.root or data.root or ""
    hub = format_of(data, split) == "huggingface"
    if root and not (hub and is_hub(root)) and not exists(root):
        other = f", or {PREFIX}OWNER/NAME of the Hugging Face hub" if hub else ""
        raise UserError(f"data.root {root} does not exist: give the directory of the data set{other}")
    if os.path.isfile(root):
        raise UserError(f"data.root {root} is a file: give the directory of the data set")
    return root


def format_of(data: Data, split: Split) -> DataFormat:
    return split.format or data.format


def list_files(data: Data, split: Split) -> Iterator[tuple[str, str]]:
    """(name, path) of every file that defines the images and objects of a split."""
    if format_of(data, split) != "shapes":
        yield from READERS[format_of(data, split)].lists(split.root or data.root or "", split)


@dataclass(frozen=True)
class Part:
    """The records of a part (train or val), in the order of its splits."""

    categories: tuple[Category, ...]
    records: tuple[Record, ...]
    sizes: tuple[int, ...]
    """records of each split"""
    dropped: Mapping[str, int]
    """objects of classes that `data.classes` does not list, by class"""


def read_part(data: Data, part: str, faults: FaultLog) -> Part:
    """Read all splits of a part, number their classes alike in all parts, and check every box.

    Raises UserError for classes that `data.classes` does not list, for a part without images, and for a training part
    without an object to learn from.
    """
    splits: tuple[Split, ...] = {"train": data.train, "val": data.val}[part]
    sources = [_read_split(data, part, split, faults) for split in splits]
    categories = _choose_categories(data, part, sources)
    ids = {category.name: category.id for category in categories}
    numbers, dropped = Numbering(faults, part), Counter[str]()
    records = []
    for source in sources:
        numbers.next_source(source)
        aliases = _match_names([category.name for category in source.categories], ids)
        for record in source.records:
            record = replace(record, image_id=numbers.take_image(record.image_id))
            records.append(_finish_record(record, source, aliases, ids, numbers, dropped, faults))
        _tell_aliases(source, aliases)
    if not records:
        raise UserError(f"data.{part} has no images left: check its files, and the ids that select them")
    _refuse_others(data, part, dropped, ids)
    _check_objects(data, part, records, categories)
    return Part(categories, tuple(records), tuple(len(source.records) for source in sources), dict(dropped))


def _read_split(data: Data, part: str, split: Split, faults: FaultLog) -> SplitSource:
    if format_of(data, split) == "shapes":  # drawn from the data section's own seed and size
        from refinedet.pipeline.data.drawings import read_drawings  # only here: it is not for data sets of users

        splits = {"train": data.train, "val": data.val}[part]
        first = sum(other.count or 0 for other in splits[: splits.index(split)] if format_of(data, other) == "shapes")
        return _keep_share(read_drawings(data, part, first, split), split.share)
    return _keep_share(READERS[format_of(data, split)].read(root_of(data, split), split, faults), split.share)


def _keep_share(source: SplitSource, share: tuple[float, float]) -> SplitSource:
    """The records in a share of an order drawn by file names; they stay in the order of the source.

    Images with and without objects are divided alike. A phase drawn by the source's name makes the shares of many small
    splits right on average.
    """
    if share == (0.0, 1.0):
        return source
    key = [keyed_integer(2**64, "share", record.file_name) for record in source.records]
    phase = keyed_integer(2**32, "share", source.name) / 2**32
    kept: list[int] = []
    for shown in (True, False):
        group = [at for at, record in enumerate(source.records) if bool(record.annotations) == shown]
        group.sort(key=lambda at: (key[at], at))
        kept += [at for place, at in enumerate(group) if share[0] <= (place + phase) / len(group) < share[1]]
    return replace(source, records=tuple(source.records[at] for at in sorted(kept)))


def _choose_categories(data: Data, part: str, sources: list[SplitSource]) -> tuple[Category, ...]:
    """Categories in the order of their labels, with ascending ids.

    The data set's own ids stay where it has any and `data.classes` does not change their order.
    """
    fixed = all(source.fixed_ids for source in sources)
    known: dict[int, Category] = {}
    if fixed:
        for source in sources:
            found = {category.id: category for category in source.categories}
            if known and found != known and data.classes is None:
                raise UserError(
                    f"{source.name} has other categories than the splits before it: splits of one part must agree; "
                    "data.classes=[...] selects classes by name"
                )
            known |= found
        by_name = {clean_name(category.name): category for category in known.values()}
    else:
        by_name = {}
    if data.classes is None:
        if fixed:
            _refuse_similar([category.name for category in known.values()])
            return tuple(Category(entry.id, clean_name(entry.name)) for entry in sorted(known.values()))
        names = _derive_names(data, part, sources)
        return tuple(Category(number, name) for number, name in enumerate(names, start=1))
    names = [clean_name(name) for name in data.classes]
    ids = [by_name[name].id for name in names if name in by_name]
    if len(ids) < len(names) or ids != sorted(ids) or len(by_name) < len(known):
        ids = list(range(1, len(names) + 1))
    return tuple(Category(number, name) for number, name in zip(ids, names, strict=True))


def _derive_names(data: Data, part: str, sources: list[SplitSource]) -> list[str]:
    """Sorted names of the classes of both parts: training and validation must number them alike."""
    others = {"train": data.val, "val": data.train}[part]
    this = {"train": data.train, "val": data.val}[part]
    silent = FaultLog(2**62, "the other part", silent=True)
    part_of = {"train": "val", "val": "train"}[part]
    all_sources = sources + [_read_split(data, part_of, split, silent) for split in others if split not in this]
    names = {clean_name(category.name) for source in all_sources for category in source.categories} - {""}
    if not names:
        count = sum(len(source.records) for source in sources)
        raise UserError(
            f"data.{part} has {count} images and not one object to learn from: check where its annotations are, and "
            "what they are called, or list the classes in data.classes"
        )
    _refuse_similar(names)
    logger.info("data.classes is not given: the data set has %d classes: %s", len(names), ", ".join(sorted(names)))
    return sorted(names)


def clean_name(name: str) -> str:
    """A class name without white space around it, and with single spaces in it."""
    return " ".join(name.split())


def _refuse_similar(names: Iterable[str]) -> None:
    """UserError for classes that differ in upper and lower case or white space alone."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        key = clean_name(name).casefold()
        if key in seen:
            raise UserError(
                f"the data set has the classes {seen[key]!r} and {name!r}, which differ in upper and lower case or "
                "white space alone: correct the annotations, or list the classes that are meant in data.classes"
            )
        seen[key] = name


def _match_names(names: list[str], ids: Mapping[str, int]) -> dict[str, str | None]:
    """The class that each name of a source stands for, None for none: exact, or else apart from case."""
    folded = Counter(name.casefold() for name in ids)
    by_fold = {name.casefold(): name for name in ids if folded[name.casefold()] == 1}
    matches = {}
    for name in names:
        clean = clean_name(name)
        matches[name] = clean if clean in ids else by_fold.get(clean.casefold())
    return matches


def _tell_aliases(source: SplitSource, aliases: Mapping[str, str | None]) -> None:
    for name, match in aliases.items():
        if match is not None and match != name:
            logger.warning("%s: class %r is taken as %r", source.name, name, match)


def _finish_record(
    record: Record,
    source: SplitSource,
    aliases: Mapping[str, str | None],
    ids: Mapping[str, int],
    numbers: Numbering,
    dropped: Counter[str],
    faults: FaultLog,
) -> Record:
    """The record with final category and annotation ids; boxes that cannot be trained on are reported, and stay."""
    names = numbers.names
    kept = Annotations()
    for annotation in record.annotations:
        name = names[annotation.category_id]
        match = aliases[name]
        if match is None:
            dropped[clean_name(name)] += 1
            continue
        number = numbers.take_annotation(annotation.id, source)
        kept.append(annotation._replace(id=number, category_id=ids[match]))
        if fault := fault_of_box(annotation.bbox, record.width or float("inf"), record.height or float("inf")):
            key = f"annotation {number}" if source.fixed_ids else f"{record.file_name}, object {annotation.id}"
            faults.add(BadSample(source.name, key, f"{fault}; it is not trained on"))
    return replace(record, annotations=kept)


def _refuse_others(data: Data, part: str, dropped: Mapping[str, int], ids: Mapping[str, int]) -> None:
    if not dropped:
        return
    counts = ", ".join(f"{name!r} ({count})" for name, count in sorted(dropped.items())[:20])
    if data.other_classes == "drop":
        logger.warning("data.%s: %d objects of classes that are not listed are excluded: %s", part,
                       sum(dropped.values()), counts)  # fmt: skip
        return
    raise UserError(
        f"data.{part} has {sum(dropped.values())} objects of classes that data.classes does not list: {counts}; "
        f"it lists {', '.join(list(ids)[:20])}. Add them, or leave such objects out with data.other_classes=drop"
    )


def _check_objects(data: Data, part: str, records: list[Record], categories: tuple[Category, ...]) -> None:
    """UserError where nothing can be learned; a warning for classes without objects."""
    found = Counter(
        annotation.category_id
        for record in records
        for annotation in record.annotations
        if not annotation.iscrowd
        and (data.include_difficult or not annotation.difficult)
        and fault_of_box(annotation.bbox, record.width or float("inf"), record.height or float("inf")) is None
    )
    if part == "train" and not found:
        raise UserError(
            f"data.train has {len(records)} images and not one object to learn from: check where its annotations are, "
            "and what they are called"
        )
    if not found:
        logger.warning("data.%s has %d images and no object: it can be detected in, not evaluated", part, len(records))
    elif empty := [category.name for category in categories if category.id not in found]:
        names = ", ".join(empty[:20])
        logger.warning("data.%s has no object of %d of its %d classes: %s", part, len(empty), len(categories), names)


assert {*READERS, "shapes"} == set(get_args(DataFormat))
