"""A check of every digest and box of a set of shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from refinedet.pipeline.data.annotations import fault_of_box
from refinedet.pipeline.data.images import EXTENSIONS, decode_image
from refinedet.pipeline.data.index import ShardSet, contents_name, format_key, open_shards
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.data.shards import OURS
from refinedet.pipeline.runs import storage

_THREADS = 2


@dataclass(frozen=True)
class CheckReport:
    """Findings of `check_shards`; the shards are sound if there are no faults."""

    num_shards: int
    num_samples: int
    num_objects: int
    faults: tuple[BadSample, ...]


def check_shards(url: str, *, decode: bool = True) -> CheckReport:
    """Read every byte of the shards: digests, sizes, tar members, keys, objects, boxes and, with `decode`, images."""
    shards = open_shards(url)
    faults: list[BadSample] = []
    listed = {*OURS, *shards.names, *(contents_name(name) for name in shards.names)}
    faults += [BadSample(name, "-", "not in the index") for name in storage.list_folder(url) if name not in listed]
    seen: dict[int, str] = {}
    num_objects = 0
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for shard, found in enumerate(pool.map(lambda at: _check_shard(shards, at, decode), range(len(shards)))):
            faults += found.faults
            num_objects += found.num_objects
            for key, image_id in found.image_ids.items():
                if image_id in seen:
                    faults.append(
                        BadSample(shards.names[shard], key, f"image id {image_id} is taken by {seen[image_id]}")
                    )
                seen[image_id] = key
    return CheckReport(len(shards), shards.num_samples, num_objects, tuple(faults))


@dataclass
class _Found:
    faults: list[BadSample]
    image_ids: dict[str, int]
    num_objects: int = 0


def _check_shard(shards: ShardSet, shard: int, decode: bool) -> _Found:
    name, found = shards.names[shard], _Found([], {})

    def fault(key: str, reason: str) -> None:
        found.faults.append(BadSample(name, key, reason))

    url = shards.shard_url(shard)
    try:
        contents = shards.contents(shard)
        content = read_file(url)
    except (OSError, ValueError) as error:
        fault("-", f"cannot be read ({error})")
        return found
    if len(content) != shards.num_bytes[shard]:
        fault("-", f"has {len(content)} bytes, the index has {shards.num_bytes[shard]}")
    elif storage.digest_bytes(content) != shards.sha256[shard]:
        fault("-", "does not match its digest")
    members: list[tuple[str, bytes]] = []
    try:
        members.extend(_members(content))
    except (tarfile.TarError, EOFError, ValueError) as error:
        fault("-", f"the tar cannot be read to its end ({error})")
    samples: dict[str, dict[str, bytes]] = {}
    for member, content in members:
        if member.startswith("/") or ".." in member.split("/"):
            fault(member, "this name of a tar member points out of its directory")
            continue
        key, _, extension = member.partition(".")
        samples.setdefault(key, {})[extension] = content
    keys = dict.fromkeys(format_key(int(number)) for number in contents.keys)
    for key in keys:
        if key not in samples:
            fault(key, "is missing")
    for key, sample in samples.items():
        if key not in keys:
            fault(key, "not in the index")
        else:
            _check_sample(key, sample, shards, decode, found, fault)
    return found


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, file.read() if file else b""


def _check_sample(
    key: str,
    sample: dict[str, bytes],
    shards: ShardSet,
    decode: bool,
    found: _Found,
    fault: Callable[[str, str], None],
) -> None:
    try:
        facts = json.loads(sample["json"])
        found.image_ids[key] = facts["image_id"]
        size = (facts["width"], facts["height"])
        known = {category.id for category in shards.categories}
        for entry in facts["objects"]:
            found.num_objects += 1
            if reason := fault_of_box(tuple(entry["bbox"]), *size):
                fault(key, f"annotation {entry['id']}: {reason}")
            if entry["category_id"] not in known:
                fault(key, f"annotation {entry['id']}: category {entry['category_id']} does not exist")
    except (KeyError, ValueError, TypeError) as error:
        fault(key, f"its objects cannot be read ({type(error).__name__}: {error})")
        return
    if decode:
        image, reason = decode_image(next((sample[name] for name in EXTENSIONS if name in sample), b""))
        if reason:
            fault(key, f"{facts['file_name']}: {reason}")
        elif image is not None and image.shape[1::-1] != size:
            fault(
                key, f"{facts['file_name']}: {image.shape[1]} x {image.shape[0]} pixels, recorded {size[0]} x {size[1]}"
            )
