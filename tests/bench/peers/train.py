"""Train RefineDet++ or a peer on real photos: same stream, backbone, weights, schedule, clip, images seen, reference.

    refinedet shard jobs/coco_photos.yaml data.root=PHOTOS data.shards=SHARDS
    python -m tests.bench.peers.train ssd --shards SHARDS/train --photos PHOTOS --weights LITE0.pth --output DIRECTORY

PHOTOS holds val/ and annotations/instances_val.json. The classes are those of the shards: those of
`refinedet shard jobs/coco_photos_10.yaml` hold the ten most frequent, no object of another class. DIRECTORY receives
curve.jsonl, one line for each validation, and checkpoint.pt; the same command resumes. Everything but the model is
equal for all: only `--learning-rate` is tuned for each, over the same number of values.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from refinedet.model import RefineDetConfig
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.data.order import count_batches
from refinedet.pipeline.data.samples import Cursor

from tests.bench.peers.models import PEERS, Peer, build_peer
from tests.data.streams import open_stream

logger = logging.getLogger("peers")

BATCH, MOMENTUM, WEIGHT_DECAY, CLIP = 16, 0.9, 5e-4, 10.0


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    weights = torch.load(args.weights, map_location="cpu", weights_only=True)
    shards = open_shards(str(args.shards))
    options: dict[str, Any] = {"num_classes": shards.num_classes, "tcb_channels": 128, "prediction_block": False}
    config = RefineDetConfig(backbone=args.backbone, input_size=args.size, **{**options, **json.loads(args.model)})
    peer = build_peer(args.peer, config, weights, args.seed).to(memory_format=torch.channels_last)
    pretrained = {parameter for name, parameter in peer.named_parameters() if ".body." in name}
    if args.backbone_rate == 0:
        for parameter in pretrained:
            parameter.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": [one for one in peer.parameters() if one not in pretrained], "factor": 1.0},
        {"params": [one for one in peer.parameters() if one in pretrained], "factor": args.backbone_rate},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    checkpoint = args.output / "checkpoint.pt"
    args.output.mkdir(parents=True, exist_ok=True)
    step, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        peer.load_state_dict(saved["peer"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], saved["seconds"]
    per_epoch = count_batches(shards.num_samples, BATCH)
    stream = open_stream(
        shards, input_size=args.size, augmentation=Augmentation(expand=args.expand), seed=args.seed, global_batch=BATCH,
        start=Cursor(*divmod(step, per_epoch)), epochs=args.epochs,
    )  # fmt: skip
    judge = Judge(args.photos, args.size, [category.name for category in shards.categories])
    recent: list[dict[str, float]] = []
    for batch in stream:
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step / per_epoch, args.epochs, args.learning_rate)
        losses = peer.losses(batch.images, batch.targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), args.clip or float("inf"))
        optimizer.step()
        step, seconds = step + 1, seconds + time.monotonic() - began
        recent.append({"norm": float(norm), **{name: float(loss.detach()) for name, loss in losses.items()}})
        if step % args.save_every == 0 or step % per_epoch == 0:
            state = {"peer": peer.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
            means = {name: round(float(np.mean([one[name] for one in recent])), 3) for name in recent[0]}
            logger.info("step %d: %s, %.3f s/image", step, means, seconds / step / BATCH)
            recent = []
        if step % (per_epoch * args.validate_every) == 0 or step == per_epoch * args.epochs:
            found = {"epoch": step / per_epoch, "images": step * BATCH, "seconds": round(seconds), **judge.score(peer)}
            with open(args.output / "curve.jsonl", "a") as file:
                file.write(json.dumps({**found, "arguments": vars(args)}, default=str) + "\n")
            logger.info("%s", found)


def learning_rate(epoch: float, epochs: int, peak: float) -> float:
    """Warm-up over the first epoch, then a tenth after 3/4 and a hundredth after 11/12 of the run."""
    if epoch < 1:
        return peak * (0.1 + 0.9 * epoch)
    return peak * (1.0 if epoch < epochs * 0.75 else 0.1 if epoch < epochs * 11 / 12 else 0.01)


class Judge:
    """pycocotools on the validation photos, resized to the square input."""

    def __init__(self, photos: Path, size: int, classes: Sequence[str], batch: int = 8) -> None:
        """classes: names, of labels 1, 2, ..."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth = COCO(str(photos / "annotations" / "instances_val.json"))
        self.images: list[dict[str, Any]] = self.truth.dataset["images"]
        ids = {category["name"]: category["id"] for category in self.truth.dataset["categories"]}
        self.categories = [ids[name] for name in classes]
        self.photos, self.size, self.batch = photos, size, batch

    def score(self, peer: Peer) -> dict[str, float]:
        """AP and AP50 over all classes, and over the ten with most objects."""
        peer.eval()
        results: list[dict[str, Any]] = []
        with torch.no_grad():
            for start in range(0, len(self.images), self.batch):
                infos = self.images[start : start + self.batch]
                for info, found in zip(infos, peer.detect(self._read(infos)), strict=True):
                    results += self._as_coco(info, found)
        peer.train()
        counts = {category: len(self.truth.getAnnIds(catIds=[category])) for category in self.categories}
        frequent = sorted(self.categories, key=lambda category: -counts[category])[:10]
        ap, ap50 = self._evaluate(results, self.categories)
        ap_10, ap50_10 = self._evaluate(results, frequent)
        return {"AP": ap, "AP50": ap50, "AP_frequent": ap_10, "AP50_frequent": ap50_10, "detections": len(results)}

    def _read(self, infos: Sequence[dict[str, Any]]) -> torch.Tensor:
        pixels = [cv2.imread(str(self.photos / "val" / info["file_name"]))[:, :, ::-1] for info in infos]
        squares = np.stack([cv2.resize(one, (self.size, self.size)) for one in pixels])
        return torch.from_numpy(squares).permute(0, 3, 1, 2)

    def _as_coco(self, info: dict[str, Any], found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        scale = torch.tensor([info["width"], info["height"]] * 2) / self.size
        boxes = found["boxes"] * scale
        boxes[:, 2:] -= boxes[:, :2]
        rows = zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
        return [
            {"image_id": info["id"], "category_id": self.categories[label - 1], "bbox": box, "score": score}
            for box, score, label in rows
        ]

    def _evaluate(self, results: list[dict[str, Any]], categories: list[int]) -> tuple[float, float]:
        if not results:
            return 0.0, 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes([dict(one) for one in results]), "bbox")
            evaluation.params.catIds = categories
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return round(float(evaluation.stats[0]), 5), round(float(evaluation.stats[1]), 5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    for name in ("shards", "photos", "weights", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--backbone-rate", type=float, default=1.0, help="of pretrained weights, relative; 0: fixed")
    parser.add_argument("--clip", type=float, default=CLIP, help="largest gradient norm; 0: none")
    parser.add_argument("--expand", action="store_true", help="with SSD's expansion of the canvas")
    parser.add_argument("--model", default="{}", help="fields of RefineDetConfig, as JSON")
    parser.add_argument("--validate-every", type=int, default=3, help="epochs")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the order and the augmentation")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
