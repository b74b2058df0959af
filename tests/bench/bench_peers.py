"""A training step and a detection of RefineDet++ and its peers, in turns, on the same batch and backbone.

    python -m tests.bench.bench_peers [--size 256] [--batch 8] [--repeats 10] [--quick] [--json OUT]

Random weights; every repetition runs every peer once, so that a busy machine slows all of them alike. A step is the
loss, its gradients, their clipping and SGD. `tests.bench.peers.train` trains them on photos.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch
from refinedet.model import RefineDetConfig, Targets

from tests.bench.peers.models import PEERS, Peer, build_peer
from tests.bench.record import describe_where, save_result

OBJECTS = 7
"""of an image, as COCO has"""


def make_batch(batch: int, size: int, classes: int) -> tuple[torch.Tensor, list[Targets]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    targets = []
    for _ in range(batch):
        corner = torch.rand(OBJECTS, 2, generator=generator) * size * 0.6
        side = size * (0.1 + 0.3 * torch.rand(OBJECTS, 2, generator=generator))
        labels = torch.randint(1, classes + 1, (OBJECTS,), generator=generator)
        targets.append(Targets(torch.cat([corner, corner + side], dim=1), labels))
    return images.contiguous(memory_format=torch.channels_last), targets


def training_step(peer: Peer, images: torch.Tensor, targets: Sequence[Targets]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(peer.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        peer.train()
        loss = torch.stack(list(peer.losses(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 10)
        optimizer.step()

    return step


def detection(peer: Peer, images: torch.Tensor) -> Callable[[], None]:
    def detect() -> None:
        peer.eval()
        with torch.no_grad():
            peer.detect(images)

    return detect


def measure(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call of every repetition but the first."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the command; times mean nothing")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.repeats = 128, 2, 1
    config = RefineDetConfig(
        backbone=options.backbone,
        input_size=options.size,
        num_classes=options.classes,
        tcb_channels=128,
        prediction_block=False,
    )
    weights = timm.create_model(options.backbone).state_dict()
    images, targets = make_batch(options.batch, options.size, options.classes)
    peers = {name: build_peer(name, config, weights).to(memory_format=torch.channels_last) for name in sorted(PEERS)}
    training = measure({name: training_step(peer, images, targets) for name, peer in peers.items()}, options.repeats)
    detecting = measure({name: detection(peer, images) for name, peer in peers.items()}, options.repeats)
    ssd = statistics.median(training["ssd"]), statistics.median(detecting["ssd"])
    rows = []
    for name, peer in peers.items():
        step, found = statistics.median(training[name]), statistics.median(detecting[name])
        rows.append(
            [
                name,
                round(1e3 * step / options.batch, 1),
                _spread(training[name], options.batch),
                round(step / ssd[0], 2),
                round(1e3 * found / options.batch, 1),
                _spread(detecting[name], options.batch),
                round(found / ssd[1], 2),
                round(sum(one.numel() for one in peer.parameters()) / 1e6, 1),
            ]
        )
    columns = ["", "training, ms per image", "quartiles", "of SSD's"]
    columns += ["detection, ms per image", "quartiles", "of SSD's", "M parameters"]
    for row in (columns, *rows):
        print("  ".join(f"{cell!s:>22}" for cell in row))  # noqa: T201
    if options.json:
        where = describe_where(("torchvision", "timm"))
        workload = (
            f"{options.backbone} with random weights, {options.size} pixels, batch {options.batch}, "
            f"{options.classes} classes, {OBJECTS} objects per image; the peers take turns."
        )
        save_result(options.json, columns, rows, where, workload=workload, spread="quartiles of the repetitions")


def _spread(seconds: Sequence[float], batch: int) -> str:
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    return f"{1e3 * low / batch:.1f} - {1e3 * high / batch:.1f}"


if __name__ == "__main__":
    main()
