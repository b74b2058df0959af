"""Writing shards: plain webdataset tars, the same bytes for the same input, in parallel, resumable.

A sample is its image, `<key>.jpg`, `.png` or `.webp`, the original bytes, and `<key>.json`, its objects. The order of
the data set is kept. A shard and its contents file are each written whole or not at all, and `index.json` last; the
same call after a crash writes only what is missing. One writer at a time holds the directory; another data set's
shards in the same place are an error, never mixed or written over.
"""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.annotations import Record
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.index import FORMAT_VERSION, INDEX, ShardSet, open_shards
from refinedet.pipeline.data.lock import LOCK, WriterLock, writer_lock
from refinedet.pipeline.data.readers import Part, format_of, list_files, read_part
from refinedet.pipeline.data.remote import exists, reach, read_json, write_json
from refinedet.pipeline.data.shard_file import ShardWork, WrittenShard, write_shard
from refinedet.pipeline.data.statistics import STATISTICS, part_statistics
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)

REQUEST = "request.json"
WriteAll = Callable[[Sequence[ShardWork]], Generator[WrittenShard]]
"""writes shards, and yields each as it is finished; closed early, it ends what it has begun"""
OURS = frozenset({INDEX, REQUEST, LOCK, STATISTICS})
"""files of a directory of shards beside the shards"""
_OVERHEAD = 2048  # bytes of a sample beside its image: tar headers and objects, about
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def write_in_threads(works: Sequence[ShardWork], threads: int = 2) -> Generator[WrittenShard]:
    """Write shards in threads of this process."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:
            for future in as_completed([pool.submit(write_shard, work) for work in works]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def prepare_shards(
    data: Data,
    part: str,
    destination: str,
    *,
    write_all: WriteAll = write_in_threads,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Write `part` ("train" or "val") of a data set as shards into `destination`; return at once where they exist.

    destination  directory or fsspec URI
    write_all    writes the shards: in threads here, or as tasks of a cluster; the same bytes
    on_progress  called with (samples done, samples in all) as shards are finished
    """
    splits: tuple[Split, ...] = {"train": data.train, "val": data.val}[part]
    if not splits:
        raise UserError(f"data.{part} is empty: name at least one split")
    lists = _list_digests(data, part, splits, destination)
    request = _request(data, part, splits, lists)
    if _is_complete(destination, request):
        return open_shards(destination)
    with _writable(destination), writer_lock(destination) as lock:
        if _is_complete(destination, request):  # by the writer that was waited for
            return open_shards(destination)
        _remove_partials(destination)
        faults = FaultLog(data.max_bad_samples, f"data.{part}")
        source = read_part(data, part, faults)
        write_json(storage.join(destination, REQUEST), {"request": request})
        works = _divide(data, destination, source.records, request)
        lines = _write_shards(works, write_all, faults, lock, on_progress)
        lock.check()
        sets = [split.set for split in splits if split.set] if data.format == "voc" else []
        index = {"format": data.format, "part": part, "sets": sets, "request": request, "lists": dict(lists)}
        _tell_turned(data, part, lines)
        _write_index(destination, index, source, lines, faults)
    return open_shards(destination)


@contextmanager
def _writable(destination: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(
            f"{destination} cannot be written ({error.strerror}): give write access, or choose another directory with "
            "data.shards"
        ) from error


def _list_digests(data: Data, part: str, splits: tuple[Split, ...], destination: str) -> dict[str, str]:
    """SHA-256 of every file that defines the images and objects of a part, those of one split together where many.

    Complete shards remember those they were written from: where they are used, the data set need not exist.
    """
    index = storage.join(destination, INDEX)
    remembered: dict[str, str] = read_json(index).get("lists", {}) if exists(index) else {}
    found = {}
    for number, split in enumerate(splits):
        name = f"{number} {split.set or split.annotations or split.image_info or split.images}"
        try:
            files = {file: storage.digest_file(path).sha256 for file, path in list_files(data, split)}
        except (FileNotFoundError, UserError) as error:
            if name not in remembered:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{error.filename or error} does not exist: check data.root and the files that data.{part} names"
                ) from None
            found[name] = remembered[name]
        else:
            found[name] = storage.digest_json(files)
    return found


def _request(data: Data, part: str, splits: tuple[Split, ...], lists: Mapping[str, str]) -> str:
    """Digest of all that decides what the shards hold; the same request finds them without reading the data set."""
    drawn = [split for split in splits if format_of(data, split) == "shapes"]
    asked = {
        "version": FORMAT_VERSION,
        "part": part,
        "splits": [
            split.model_dump(
                exclude={"weight", "root"}
                | (set() if split in drawn else {"count"})
                | ({"share"} if split.share == (0.0, 1.0) else set())
            )
            for split in splits
        ],
        "lists": lists,
        "data": data.model_dump(
            include={"format", "shard_bytes", "classes", "other_classes", "exif", "max_side"}
            | ({"seed", "image_size"} if drawn else set())
            | ({"drawing"} if drawn and data.drawing != "simple" else set())
        ),
    }
    return storage.digest_json(asked)


def _is_complete(destination: str, request: str) -> bool:
    """Return whether the shards of a request exist; UserError where another data set's do."""
    for name, complete in ((INDEX, True), (REQUEST, False)):
        path = storage.join(destination, name)
        if exists(path):
            if read_json(path).get("request") != request:
                raise UserError(
                    f"{destination} holds shards of another data set, of other settings or of an earlier release: "
                    "remove it, or choose another directory with data.shards"
                )
            if complete:
                _remove_partials(destination)
            return complete
    return False


def _remove_partials(destination: str) -> None:
    """Remove what a writer that was killed has left half written."""
    for name in reach(lambda: storage.list_folder(destination), destination):
        if name.endswith(".partial"):
            try:
                storage.remove(storage.join(destination, name))
            except OSError:  # complete shards are used where they cannot be written
                return


def _divide(data: Data, destination: str, records: Sequence[Record], request: str) -> list[ShardWork]:
    groups = _cut(records, data.shard_bytes)
    starts = itertools.accumulate((len(group) for group in groups), initial=0)
    return [
        ShardWork(data, destination, number, start, group, request)
        for number, (group, start) in enumerate(zip(groups, starts, strict=False))
    ]


def _write_shards(
    works: Sequence[ShardWork],
    write_all: WriteAll,
    faults: FaultLog,
    lock: WriterLock,
    on_progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write all shards; returns their lines of the index, in order."""
    done, total = 0, sum(len(work.records) for work in works)
    lines: dict[int, dict[str, Any]] = {}
    with closing(write_all(works)) as written:
        for number, line, found in written:
            for fault in found:
                faults.add(fault)
            lines[number] = line
            done += len(works[number].records)
            if on_progress:
                on_progress(done, total)
            lock.check()
    return [lines[number] for number in range(len(works))]


def _cut(records: Sequence[Record], shard_bytes: int) -> list[list[Record]]:
    """Split records, in order, into shards that are closed once they hold `shard_bytes`."""
    groups: list[list[Record]] = [[]]
    size = 0
    for record in records:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += record.num_bytes + _OVERHEAD
    return groups


def _tell_turned(data: Data, part: str, lines: list[dict[str, Any]]) -> None:
    turned = [name for line in lines for name in line["turned"]]
    if turned:
        other = "displayed" if data.exif == "stored" else "stored"
        logger.warning(
            "data.%s: %d images carry an EXIF rotation, the first: %s; boxes are taken to follow the %s picture, set "
            "data.exif=%s where they do not", part, len(turned), turned[0], data.exif, other,
        )  # fmt: skip


def _write_index(
    destination: str, index: dict[str, Any], source: Part, lines: list[dict[str, Any]], faults: FaultLog
) -> None:
    split_sizes, last = [], 0
    kept = list(itertools.accumulate(itertools.chain.from_iterable(line["kept"] for line in lines)))
    for end in itertools.accumulate(source.sizes):
        split_sizes.append((kept[end - 1] if end else 0) - last)
        last += split_sizes[-1]
    lines = [line for line in lines if line["num_samples"]]
    if not lines:
        raise UserError(f"data.{index['part']} has no image that can be used: {'; '.join(map(str, faults.faults[:5]))}")
    names = ("num_samples", "bytes", "sha256", "contents_sha256")
    table = {"names": [line["name"] for line in lines], **{name: [line[name] for line in lines] for name in names}}
    categories = [asdict(category) for category in source.categories]
    whole = {
        "format_version": FORMAT_VERSION,
        **index,
        "digest": storage.digest_json([categories, table["sha256"], table["num_samples"]]),
        "num_samples": sum(table["num_samples"]),
        "split_sizes": split_sizes,
        "categories": categories,
        "facts": {"exif_turned": sum(len(line["turned"]) for line in lines), "dropped": dict(source.dropped)},
        "faults": [asdict(fault) for fault in sorted(faults.faults, key=lambda fault: fault.shard)],
        "shards": table,
    }
    statistics = part_statistics(ShardSet(destination, whole))
    write_json(storage.join(destination, STATISTICS), statistics)
    write_json(storage.join(destination, INDEX), whole)
