"""The training stream beside torchvision, albumentations, plain JPEG decoding and webdataset's own loader, in one run.

    python tests/bench/bench_stream.py [--coco DIRECTORY] [--size 512] [--rounds 5] [--turns 8] [--json OUT]

DIRECTORY is laid out as COCO 2017 (default: ../shared/data/coco-mini). Every contender goes through the same photos in
one process with one thread, in turns, and is given images for each second of CPU time: what other processes of the
machine do disturbs that least. albumentations takes part where it can be imported. Also measured: the stream with two
workers by the clock, a cold start, and an index of ten million samples in ten thousand shards (opening, seeking,
memory).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import webdataset as wds  # noqa: E402
from refinedet.pipeline.config.spec import Augmentation, Data, Split  # noqa: E402
from refinedet.pipeline.data.augmentation import INTERPOLATIONS, MEAN_RGB, augment  # noqa: E402
from refinedet.pipeline.data.index import FORMAT_VERSION, ShardSet, contents_name, open_shards  # noqa: E402
from refinedet.pipeline.data.order import EpochOrder  # noqa: E402
from refinedet.pipeline.data.reading import decode_sample  # noqa: E402
from refinedet.pipeline.data.samples import Cursor  # noqa: E402
from refinedet.pipeline.data.shards import prepare_shards  # noqa: E402
from refinedet.pipeline.data.tensors import stack_images  # noqa: E402
from refinedet.pipeline.runs import storage  # noqa: E402

from tests.bench.record import describe_where, save_result  # noqa: E402
from tests.data.streams import PLAIN, open_stream  # noqa: E402

BATCH = 8
STREAM = "stream, full SSD augmentation"
NUM_SHARDS, PER_SHARD = 10_000, 1000


def stream_images(shards: ShardSet, size: int, augmentation: Augmentation, workers: int = 0) -> Iterator[int]:
    stream = open_stream(
        shards, input_size=size, augmentation=augmentation, seed=0, global_batch=BATCH, loader_workers=workers
    )
    for batch in stream:
        yield len(batch)


def webdataset_images(shards: ShardSet, size: int) -> Iterator[int]:
    """webdataset's own reading, shuffling and batching around our decoding and augmentation."""

    def view(sample: dict[str, Any]) -> np.ndarray:
        decoded = decode_sample(sample, shards, sample["__url__"])
        key = (0, 0, sample["__key__"])
        return augment(decoded.image, decoded.boxes, decoded.labels, size=size, key=key, settings=Augmentation())[0]

    urls = [shards.shard_url(shard) for shard in range(len(shards))]
    dataset: Any = wds.WebDataset(urls, shardshuffle=100)  # type: ignore[attr-defined]
    dataset = dataset.shuffle(1000).map(view).batched(BATCH, collation_fn=lambda views: stack_images(views))
    while True:
        for images in dataset:
            yield len(images)


def torchvision_images(folder: Path, size: int) -> Iterator[int]:
    """CocoDetection with the same augmentation from transforms.v2, as torchvision's SSD recipe composes it."""
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import InterpolationMode, v2

    modes = [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, InterpolationMode.NEAREST_EXACT]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill=list(MEAN_RGB), side_range=(1.0, 4.0), p=0.5),
            v2.RandomIoUCrop(),
            v2.RandomChoice([v2.Resize((size, size), interpolation=mode) for mode in modes]),
            v2.RandomHorizontalFlip(),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    annotations = str(folder / "annotations" / "instances_train2017.json")
    photos = CocoDetection(str(folder / "train2017"), annotations, transforms=transform)
    # RandomIoUCrop refuses a photo without objects, so torchvision's own recipe leaves those out.
    with_objects = [index for index, image in enumerate(photos.ids) if photos.coco.getAnnIds(image)]
    dataset = wrap_dataset_for_transforms_v2(photos, target_keys=["boxes", "labels"])
    order = np.random.default_rng(0)
    while True:
        images = []
        for index in order.permutation(with_objects):
            image, target = dataset[int(index)]
            if "boxes" in target:
                images.append(image)
            if len(images) == BATCH:
                torch.stack(images)
                yield len(images)
                images = []


def albumentations_images(folder: Path, size: int) -> Iterator[int]:
    """OpenCV's decoding and the nearest of albumentations' transforms; its crop keeps all boxes, ours any."""
    import albumentations

    crop = albumentations.RandomSizedBBoxSafeCrop(size, size, erosion_rate=0.3, p=6 / 7)
    recipe: list[Any] = [
        albumentations.RandomBrightnessContrast(brightness_limit=0.125, contrast_limit=0.5, p=0.75),
        albumentations.HueSaturationValue(hue_shift_limit=18, sat_shift_limit=60, val_shift_limit=0, p=0.75),
        albumentations.CropAndPad(percent=(0, 1.5), keep_size=False, fill=MEAN_RGB, p=0.5),
        crop,
        albumentations.OneOf([albumentations.Resize(size, size, each) for each in INTERPOLATIONS], p=1),
        albumentations.HorizontalFlip(p=0.5),
    ]
    boxes = albumentations.BboxParams("coco", label_fields=["labels"], min_area=1, clip=True)
    transform = albumentations.Compose(recipe, bbox_params=boxes)
    truth = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    order = np.random.default_rng(0)
    while True:
        views = []
        for index in order.permutation(len(truth["images"])):
            image = truth["images"][index]
            pixels = cv2.cvtColor(cv2.imread(str(folder / "train2017" / image["file_name"])), cv2.COLOR_BGR2RGB)
            own = objects[image["id"]]
            labels = [annotation["category_id"] for annotation in own]
            view = transform(image=pixels, bboxes=[annotation["bbox"] for annotation in own], labels=labels)
            views.append(view["image"])
            if len(views) == BATCH:
                stack_images(views)
                yield len(views)
                views = []


def decoded_images(folder: Path) -> Iterator[int]:
    contents = [path.read_bytes() for path in sorted((folder / "train2017").glob("*.jpg"))]
    while True:
        for content in contents:
            cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            yield 1


def take(source: Iterator[int], count: int) -> int:
    done = 0
    while done < count:
        done += next(source)
    return done


def compare(folder: Path, shards: ShardSet, size: int, rounds: int, turns: int) -> dict[str, list[float]]:
    """Images for a second of CPU time, by contender and round.

    A round is many short turns: whatever slows the machine for a while slows every contender alike.
    """
    sources = {
        STREAM: stream_images(shards, size, Augmentation()),
        "stream with mosaic": stream_images(shards, size, Augmentation(mosaic=True)),
        "stream, plain resize": stream_images(shards, size, PLAIN),
        "webdataset's loader, same work": webdataset_images(shards, size),
        "torchvision CocoDetection + v2": torchvision_images(folder, size),
        "plain JPEG decoding": decoded_images(folder),
    }
    if find_spec("albumentations"):
        sources["albumentations, nearest recipe"] = albumentations_images(folder, size)
    for source in sources.values():
        next(source)
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(rounds):
        images, seconds = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0.0)
        for _ in range(turns):
            for name, source in sources.items():
                began = time.process_time()
                images[name] += take(source, 2 * BATCH)
                seconds[name] += time.process_time() - began
        for name in sources:
            rates[name].append(images[name] / seconds[name])
    return rates


def measure_workers(shards: ShardSet, size: int, count: int) -> tuple[float, float]:
    """Seconds to the first batch, workers' start included, and images per second by the clock, of two workers."""
    began = time.perf_counter()
    source = stream_images(shards, size, Augmentation(), workers=2)
    next(source)
    first = time.perf_counter() - began
    began = time.perf_counter()
    return first, take(source, count) / (time.perf_counter() - began)


def write_large_index(folder: Path, cursors: list[Cursor], seed: int, batch: int) -> None:
    """An index of ten million samples, and the contents of the shards that the cursors' batches lie in."""
    numbers = np.arange(PER_SHARD, dtype=np.int64)
    same = np.ones_like(numbers)
    columns = {
        "keys": numbers,
        "offsets": numbers * 160_000,
        "sizes": same * 160_000,
        "objects_offsets": same * 158_000,
    }
    file = io.BytesIO()
    np.savez_compressed(file, crc32=np.zeros(PER_SHARD, np.uint32), **columns)  # type: ignore[arg-type]
    contents = file.getvalue()
    names = [f"shard-{number:06d}.tar" for number in range(NUM_SHARDS)]
    table = {
        "names": names,
        "bytes": [PER_SHARD * 160_000] * NUM_SHARDS,
        "sha256": [storage.digest_bytes(name.encode()) for name in names],
        "contents_sha256": [storage.digest_bytes(contents)] * NUM_SHARDS,
        "num_samples": [PER_SHARD] * NUM_SHARDS,
    }
    index = {"format_version": FORMAT_VERSION, "format": "coco", "part": "train", "digest": "0" * 64}
    index |= {"categories": [{"id": 1, "name": "thing"}], "faults": [], "shards": table}
    storage.write_json(str(folder / "index.json"), index)
    for epoch, at in cursors:
        order = EpochOrder([PER_SHARD] * NUM_SHARDS, seed=seed, epoch=epoch, window=4096, streams=16)
        for position in order.positions(at * batch, (at + 1) * batch):
            (folder / contents_name(names[position // PER_SHARD])).write_bytes(contents)


LARGE_INDEX = """
import json, os, sys, time
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.data.order import EpochOrder

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

before = resident_mb()
began = time.perf_counter()
shards = open_shards(sys.argv[1])
opened = time.perf_counter() - began
seeks = []
for epoch, at in json.loads(sys.argv[2]):
    began = time.perf_counter()
    order = EpochOrder(shards.sizes, seed=0, epoch=epoch, window=4096, streams=16)
    entries = [shards.entry(int(position)) for position in order.positions(at * 32, (at + 1) * 32)]
    seeks.append(time.perf_counter() - began)
after = resident_mb()
print(json.dumps({"samples": shards.num_samples, "open_s": opened, "worst_seek_s": max(seeks),
                  "memory_mb": after - before, "process_mb": after}))
"""


def measure_large_index() -> dict[str, float]:
    cursors = [Cursor(0, 0), Cursor(0, 312_499), Cursor(7, 123_456), Cursor(109, 300_001), Cursor(3, 1)]
    with tempfile.TemporaryDirectory() as folder:
        write_large_index(Path(folder), cursors, seed=0, batch=32)
        command = [sys.executable, "-c", LARGE_INDEX, folder, json.dumps(cursors)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def table(result: dict[str, Any], shards: ShardSet) -> Iterator[str]:
    yield f"{shards.num_samples} photos, views of {result['size']} x {result['size']}, one core\n"
    yield f"{'':34}{'images/s of CPU':>16}{'lowest':>9}{'highest':>9}{'stream with full augmentation is':>36}"
    for name, values in result["rates"].items():
        ratio = f"{result['ratios'][name]:30.2f} times" if name != STREAM else ""
        yield f"{name:34}{statistics.median(values):16.1f}{min(values):9.1f}{max(values):9.1f}{ratio}"
    yield (
        f"\nfirst batch: {result['cold_start_s']:.2f} s in this process, "
        f"{result['two_workers_first_batch_s']:.2f} s with two workers, their start included"
    )
    yield f"two workers: {result['two_workers_images_per_s']:.1f} images/s by the clock"
    index = result["large_index"]
    yield (
        f"index of {index['samples']:,} samples: opens in {index['open_s']:.2f} s, "
        f"seeks in {index['worst_seek_s']:.3f} s at worst, takes {index['memory_mb']:.0f} MB "
        f"(process with torch: {index['process_mb']:.0f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, default=ROOT.parent / "shared" / "data" / "coco-mini")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=8, help="of each contender in a round, 16 images each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.coco.is_dir():
        sys.exit(f"{arguments.coco} does not exist: give a directory laid out as COCO 2017 with --coco")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    split = Split(images="train2017", annotations="annotations/instances_train2017.json")
    data = Data(format="coco", root=str(arguments.coco), train=(split,), val=(split,), shard_bytes=4 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        prepare_shards(data, "train", folder)
        shards = open_shards(folder)
        rates = compare(arguments.coco, shards, arguments.size, arguments.rounds, arguments.turns)
        began = time.perf_counter()
        next(stream_images(open_shards(folder), arguments.size, Augmentation()))
        cold = time.perf_counter() - began
        first, clocked = measure_workers(shards, arguments.size, 64 * arguments.turns)
    index = measure_large_index()

    result: dict[str, Any] = {"size": arguments.size, "rounds": arguments.rounds, "rates": rates}
    ours = statistics.median(rates[STREAM])
    result["ratios"] = {name: ours / statistics.median(values) for name, values in rates.items() if name != STREAM}
    result |= {"cold_start_s": cold, "two_workers_first_batch_s": first, "two_workers_images_per_s": clocked}
    result["large_index"] = index
    where = describe_where(["torchvision", "opencv-python-headless", "webdataset", "numpy"])
    sys.stdout.write(f"{where}\n" + "\n".join(table(result, shards)) + "\n")
    if arguments.json:
        rows = [
            [name, f"{statistics.median(values):.1f}", f"{min(values):.1f} - {max(values):.1f}",
             f"{result['ratios'][name]:.2f} times as fast" if name in result["ratios"] else ""]
            for name, values in rates.items()
        ]  # fmt: skip
        columns = ["", "images/s", "lowest - highest", "the stream is"]
        workload = (
            f"{shards.num_samples} photos of COCO, views of {arguments.size} x {arguments.size}, one core, CPU time."
        )
        spread = f"lowest and highest of {arguments.rounds} rounds"
        save_result(arguments.json, columns, rows, where, workload=workload, spread=spread, figures=result)


if __name__ == "__main__":
    main()
