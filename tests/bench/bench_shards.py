"""Writing shards of a data set as large as COCO, photos of many megapixels, and the start of an epoch of ten million.

    python -m tests.bench.bench_shards [--images 118000] [--objects 7] [--photos 12] [--samples 10000000] [--quick]
        [--json OUT]

The annotation file has COCO's size, seven objects per image with outlines of masks, and is made up. Its images are
small, so that time and memory are those of annotations, not of pixels. Memory is the peak of a process of its own. The
photos of 12 megapixels are drawn, once written as they are and once with `data.max_side`; the stream reads both in
turns, and its images for each second of CPU time are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from refinedet.pipeline.config.spec import Augmentation, Data, Sampling, Split  # noqa: E402
from refinedet.pipeline.data.sampling import EpochDraws, fix_repeats  # noqa: E402
from refinedet.pipeline.data.shards import prepare_shards  # noqa: E402

from tests.bench.bench_stream import facts  # noqa: E402
from tests.data.streams import open_stream  # noqa: E402

OUTLINE, OUTLINES = 60, 1000  # numbers of an object's outline: COCO's 860,001 objects and 470 MB; different outlines
CLASSES = 80
BATCH = 4
PHOTO = (3000, 4000)
LONGER_SIDE = 1333


def write_large_coco(folder: Path, num_images: int, objects: int) -> None:
    """An annotation file of `num_images` with `objects` each, and links to one small photo."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    photo = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
    content = cv2.imencode(".jpg", photo)[1].tobytes()
    (folder / "photo.jpg").write_bytes(content)
    with open(folder / "instances.json", "w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for number in range(1, num_images + 1):
            name = f"{number:012d}.jpg"
            os.symlink(folder / "photo.jpg", folder / "images" / name)
            url = f"http://images.cocodataset.org/train2017/{name}"
            image = {"license": 3, "file_name": name, "coco_url": url, "height": 48, "width": 64, "flickr_url": url}
            image |= {"date_captured": "2013-11-14 11:18:45", "id": number}
            file.write(("," if number > 1 else "") + json.dumps(image))
        file.write('], "annotations": [')
        outlines = [json.dumps(np.round(rng.random(OUTLINE) * 48, 2).tolist()) for _ in range(OUTLINES)]
        corners = rng.integers(0, 30, (OUTLINES, 2)).tolist()
        for number in range(num_images * objects):
            x, y = corners[number % OUTLINES]
            file.write(
                f'{"," if number else ""}{{"segmentation": [{outlines[number % OUTLINES]}], "area": 150.5, '
                f'"iscrowd": 0, "image_id": {number // objects + 1}, "bbox": [{x}, {y}, 20.5, 10.25], '
                f'"category_id": {number % CLASSES + 1}, "id": {number + 1}}}'
            )
        categories = [{"supercategory": "x", "id": number, "name": f"c{number}"} for number in range(1, CLASSES + 1)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def shard_here(folder: str) -> None:
    """Write the shards, and print the seconds and the peak of this process's memory, also of its first shard."""
    read: list[tuple[float, float]] = []

    def note(done: int, total: int) -> None:
        if not read:
            read.append((time.perf_counter() - began, peak_mb()))

    split = Split(images="images", annotations="instances.json")
    began = time.perf_counter()
    data = Data(format="coco", root=folder, train=(split,), val=(split,))
    shards = prepare_shards(data, "train", os.path.join(folder, "shards"), on_progress=note)
    result = {"images": shards.num_samples, "seconds": time.perf_counter() - began, "peak_mb": peak_mb()}
    result |= dict(zip(("first_shard_s", "first_shard_peak_mb"), read[0], strict=True))
    sys.stdout.write(json.dumps(result) + "\n")


def measure_large_coco(num_images: int, objects: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_large_coco(Path(folder), num_images, objects)
        size = (Path(folder) / "instances.json").stat().st_size
        command = [sys.executable, "-m", "tests.bench.bench_shards", "--shard", folder]
        done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return {"json_mb": size / 2**20, **json.loads(done.stdout.splitlines()[-1])}


def measure_photos(count: int, rounds: int) -> dict[str, float]:
    """Images for a second of CPU time of photos as they are and scaled down at shard time, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            coarse = np.random.default_rng(number).integers(0, 256, (300, 400, 3), dtype=np.uint8)
            photo = cv2.resize(coarse, PHOTO[::-1], interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(f"{folder}/images/{number}.jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, 90])
            images.append({"id": number, "file_name": f"{number}.jpg", "width": PHOTO[1], "height": PHOTO[0]})
            annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [900, 600, 1500, 1200]})
        truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (Path(folder) / "instances.json").write_text(json.dumps(truth))
        split = Split(images="images", annotations="instances.json")
        sources = {}
        for name, side in (("whole", None), ("max_side", LONGER_SIDE)):
            data = Data(format="coco", root=folder, train=(split,), val=(split,), max_side=side)
            shards = prepare_shards(data, "train", f"{folder}/{name}")
            stream = open_stream(shards, input_size=512, augmentation=Augmentation(), seed=0, global_batch=BATCH)
            sources[name] = iter(stream)
            next(sources[name])
        seconds = dict.fromkeys(sources, 0.0)
        for _ in range(rounds):
            for name, source in sources.items():
                began = time.process_time()
                next(source)
                seconds[name] += time.process_time() - began
        rates = {name: rounds * BATCH / taken for name, taken in seconds.items()}
        return {**rates, "times": rates["max_side"] / rates["whole"]}


def measure_epoch_start(num_samples: int) -> dict[str, float]:
    """Seconds until the first batch's samples of an epoch are known, by sampling."""
    sizes = np.full(num_samples // 1000, 1000)
    defaults = Data(format="shapes", train=(Split(count=1),), sampling=Sampling())
    options = {"seed": 0, "epoch": 1, "window": defaults.shuffle_window, "streams": defaults.canonical_streams}
    factors = 1 + np.random.default_rng(0).random(int(sizes.sum()))
    found = {}
    for name, repeats in (("uniform", None), ("repeats", fix_repeats(factors))):
        began = time.perf_counter()
        EpochDraws(sizes, repeats, **options).stretch(0, 32)  # type: ignore[arg-type]
        found[name] = time.perf_counter() - began
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=7, help="of an image")
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shard:
        shard_here(arguments.shard)
        return
    if arguments.quick:
        arguments.images, arguments.photos, arguments.samples = 200, BATCH, 10_000
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    result: dict[str, Any] = facts()
    result["epoch_start_s"] = start = measure_epoch_start(arguments.samples)
    result["photos"] = photos = measure_photos(arguments.photos, 2 if arguments.quick else 10)
    result["large_coco"] = large = measure_large_coco(arguments.images, arguments.objects)
    sys.stdout.write(
        f"{result['hardware']}; {result['versions']}; commit {result['commit']}\n"
        f"annotations of {large['images']:,} images, {large['json_mb']:.0f} MB: shards in {large['seconds']:.0f} s, "
        f"at most {large['peak_mb']:.0f} MB of memory; {large['first_shard_peak_mb']:.0f} MB when the first shard was "
        f"written, after {large['first_shard_s']:.0f} s\n"
        f"photos of 12 megapixels: {photos['whole']:.1f} images/s of CPU, {photos['max_side']:.1f} with "
        f"max_side={LONGER_SIDE}, {photos['times']:.1f} times as many\n"
        f"first batch of an epoch of {arguments.samples:,} samples: known after {start['uniform']:.2f} s, "
        f"{start['repeats']:.2f} s with repeats\n"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
